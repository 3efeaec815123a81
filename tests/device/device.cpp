// A second device in the host's own memory, for machines without a GPU. It computes with the CPU's kernels, and it refuses what
// a GPU refuses: tensors or generators of different devices in one operation.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using OptionalGenerator = std::optional<at::Generator>;

constexpr auto kOther = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- what PyTorch asks of a device

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, Device(kOther, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
c10::AllocatorRegisterer<kOther> registered_memory(&memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kOther; }
  Device exchangeDevice(Device) const override { return Device(kOther, 0); }
  Device getDevice() const override { return Device(kOther, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Draws final : at::CPUGeneratorImpl {
  Draws() {
    device_ = Device(kOther, 0);
    key_set_ = kKeys;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Draws>(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator whole = at::make_generator<Draws>();
    return whole;
  }
};

// ---- memory, views and copies

/// The same memory as the CPU sees it.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(type));
}

/// How often the host read a value and so waited for the device; kernels that borrow the CPU's do not count.
int64_t reads = 0;
/// How often it sent something there and waited until it had arrived.
int64_t sends = 0;
thread_local int borrowed = 0;
struct Borrowed {
  Borrowed() { ++borrowed; }
  ~Borrowed() { --borrowed; }
};

Tensor copy_from(const Tensor& from, const Tensor& to, bool goes_on) {
  if (from.device() != to.device() && !borrowed) {
    if (to.is_cpu())
      ++reads;
    else if (!goes_on)
      ++sends;
  }
  Tensor there = host(to);
  there.copy_(host(from));
  return to;
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& self) {
  if (!borrowed) ++reads;
  return host(self).item();
}

// ---- random numbers: drawn on the CPU by a generator of this device, none of another's

template <class Draw>
void draw(const Tensor& into, const OptionalGenerator& given, Draw with) {
  TORCH_CHECK(into.device().type() == kOther && (!given || given->device().type() == kOther),
              "Expected a tensor and a generator of the same device but found ", into.device(), " and ",
              given ? given->device() : Device(kOther, 0));
  const at::Generator& own = given ? *given : at::globalContext().defaultGenerator(Device(kOther, 0));
  at::Generator twin = at::detail::createCPUGenerator();
  twin.set_state(own.get_state());
  with(twin);
  at::Generator(own).set_state(twin.get_state());
}

Tensor& normal(Tensor& self, double mean, double std, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).normal_(mean, std, twin); });
  return self;
}
Tensor& uniform(Tensor& self, double low, double high, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).uniform_(low, high, twin); });
  return self;
}
Tensor& random(Tensor& self, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).random_(twin); });
  return self;
}
Tensor& random_to(Tensor& self, int64_t high, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).random_(high, twin); });
  return self;
}
Tensor& random_from(Tensor& self, int64_t low, std::optional<int64_t> high, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).random_(low, high, twin); });
  return self;
}
Tensor& bernoulli(Tensor& self, double p, OptionalGenerator generator) {
  draw(self, generator, [&](at::Generator twin) { host(self).bernoulli_(p, twin); });
  return self;
}
Tensor& randperm(int64_t count, OptionalGenerator generator, Tensor& out) {
  out.resize_({count});
  draw(out, generator, [&](at::Generator twin) { host(out).copy_(at::randperm(count, twin, out.options().device(at::kCPU))); });
  return out;
}

// ---- everything else

Tensor there(const Tensor& made) { return made.defined() ? made.to(Device(kOther, 0)) : made; }

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  TORCH_CHECK(weight.device() == input.device(), "Expected all tensors to be on the same device, but convolution got ",
              input.device(), " and ", weight.device());
  std::optional<Tensor> own = bias && bias->defined() ? std::optional<Tensor>(host(*bias)) : std::nullopt;
  Borrowed here_and_back;
  return there(at::convolution(host(input), host(weight), own, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& input, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  Borrowed here_and_back;
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [of_input, of_weight, of_bias] =
      at::convolution_backward(host(gradient), host(input), host(weight), at::IntArrayRef({channels}), stride, padding,
                               dilation, transposed, output_padding, groups, mask);
  return {there(of_input), there(of_weight), there(of_bias)};
}

/// Indices may lie on the CPU, as for a GPU.
bool may_mix(const std::string& name) { return name.find("index") != std::string::npos; }

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool here = false, other = false;
  auto see = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    other |= tensor.device().type() == kOther;
    here |= tensor.is_cpu() && tensor.dim() > 0;  // a number may come from anywhere
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) see(tensor);
  }
  TORCH_CHECK(!(here && other) || may_mix(op.schema().name()), "Expected all tensors to be on the same device, but ",
              op.schema().name(), " got some of the CPU and some of the other");
  // Where a result's size depends on values, a GPU has to be waited for too.
  static const std::set<std::string> sized = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"};
  if (!borrowed && sized.count(op.schema().name())) ++reads;
  Borrowed here_and_back;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("normal_", normal);
  m.impl("uniform_", uniform);
  m.impl("random_", random);
  m.impl("random_.to", random_to);
  m.impl("random_.from", random_from);
  m.impl("bernoulli_.float", bernoulli);
  m.impl("randperm.generator_out", randperm);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // By the CPU's kernels, not composed of others: the same roundings, and any strides.
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY(other, m) {
  m.def("reads() -> int", [] { return reads; });
  m.def("sends() -> int", [] { return sends; });
}

const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace
