"""One package per device. Each implements the contract of tinychat_mlx.contract."""
