"""One package per device; each fills in the contract of tinychat_mlx.backend."""
