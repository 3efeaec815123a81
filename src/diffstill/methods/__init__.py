"""Methods: what is trained against what. A method owns roles and a loss, never a loop."""
