"""Names of the folders of a visual decoder, ours and diffusers' alike."""

UNET, VAE = "unet", "vae"
SCHEDULER = "scheduler"  # beside a diffusers U-Net; the configs of our runs hold the schedule
SAFETY_CHECKER = "safety_checker"  # optional
