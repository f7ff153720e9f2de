"""Folder names inside a model's folder; those of a visual decoder's parts are the same as in diffusers' folders."""

UNET, VAE = "unet", "vae"
SCHEDULER = "scheduler"  # beside a diffusers U-Net; our checkpoints keep the schedule in their config
SAFETY_CHECKER = "safety_checker"  # optional
TUNED = "chat"  # a model that was tuned from the model of the folder
