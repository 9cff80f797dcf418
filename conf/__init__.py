"""The Hydra configs of `rlhf`, one root config for each verb; Hydra finds them as `pkg://rlhf_lightning.conf`."""
