"""Folder names of a visual decoder's parts, the same in our folders and in diffusers'."""

UNET, VAE = "unet", "vae"
SCHEDULER = "scheduler"  # beside a diffusers U-Net; our checkpoints keep the schedule in their config
SAFETY_CHECKER = "safety_checker"  # optional
