"""Overrides that turn digits-dash into a run of seconds."""

TINY = [
    "teacher.overrides={training.images: 256, training.batch_size: 32, training.warmup_images: 0,"
    " training.log_every: 2, data.limit: 300, network.block_out_channels: [8, 16], network.norm_num_groups: 4}",
    "student.block_out_channels=[8, 8]",
    "student.norm_num_groups=4",
    "data.limit=300",
    "training.images=256",
    "training.batch_size=32",
    "training.warmup_images=0",
    "training.log_every=2",
    "evaluation.samples=40",
    "evaluation.pairs=60",
    "evaluation.steps=4",
    "evaluation.guidance=[1, 2]",
]
