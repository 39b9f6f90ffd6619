"""Training: one loop, thin jobs. `accelerate launch -m train --config configs/builtin/codec.toml`."""
