"""The engine that runs a plan on `torch.distributed`."""
