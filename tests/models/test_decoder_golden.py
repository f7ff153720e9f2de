"""The visual decoder against the reference's own numbers: U-Net, VAE, samplers, added noise and training loss."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from emu_jax.checkpoints.convert import diffusers
from emu_jax.checkpoints.load import LoadedUNet, LoadedVAE, load_part
from emu_jax.generate.samplers import make_table, sample
from emu_jax.models import unet, vae
from emu_jax.models.diffusion import add_noise

CASES = {
    "pndm_50_cfg7.5": ("pndm", 50, 7.5),
    "ddim_20_cfg5": ("ddim", 20, 5.0),
    "dpmpp_2m_12_cfg5": ("dpmpp", 12, 5.0),
    "euler_15_cfg5": ("euler", 15, 5.0),
}


def close(found, expected, what: str) -> None:
    """Within 2e-4 of the largest magnitude, the golden files' tolerance."""
    worst = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert worst < 2e-4, f"{what}: off by {worst:.1e} of the largest magnitude, expected below 2e-4"
    print(f"{what}: off by {worst:.1e}")


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "mini-a" / "pretrain"


@pytest.fixture(scope="module")
def expected(folder):
    """The reference's arrays, channels last."""
    arrays = load_file(folder / "diffusion_reference.safetensors")
    return {name: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for name, value in arrays.items()}


@pytest.fixture(scope="module")
def unet_model(folder):
    loaded = load_part(folder / "unet", LoadedUNet)
    return loaded.config, loaded.params


@pytest.fixture(scope="module")
def vae_model(folder):
    loaded = load_part(folder / "vae", LoadedVAE)
    return loaded.config, loaded.params


def test_unet(unet_model, expected):
    config, params = unet_model
    arguments = (expected[f"unet/{name}"] for name in ("sample", "timesteps", "condition"))
    close(unet.apply(params, *arguments, config=config), expected["unet/eps"], "eps")


def test_vae(vae_model, expected):
    config, params = vae_model
    mean, log_variance = vae.encode(params, expected["vae/image"], config=config)
    close(mean, expected["vae/mean"], "mean")
    close(log_variance, expected["vae/logvar"], "log-variance")
    scaled = expected["vae/latents"] * config.scale  # the file's are as the decoder itself takes them
    close(vae.decode(params, scaled, config=config), expected["vae/decoded"], "image")


@pytest.mark.parametrize("case", CASES)
def test_sampler(case, folder, unet_model, vae_model, expected):
    sampler, steps, guidance = CASES[case]
    config, params = unet_model
    table = make_table(sampler, diffusers.load_schedule(folder / "scheduler"), steps)
    np.testing.assert_allclose(table.timestep, expected[f"sampling/{case}/timesteps"], rtol=1e-6)
    condition, unconditional = expected["unet/condition"][:1], expected["unet/condition"][1:]
    noise = expected["sampling/initial_latents"]
    states = sample(params, table, noise, condition, unconditional, guidance, config=config, trajectory=True)
    close(states[:4, 0], expected[f"sampling/{case}/first4"], f"{case}: first four")
    close(states[-1], expected[f"sampling/{case}/latents"], f"{case}: last")
    if case.startswith("pndm"):
        config, params = vae_model
        image = vae.decode(params, states[-1], config=config)
        close(jnp.clip(image / 2 + 0.5, 0, 1), expected[f"sampling/{case}/image"], f"{case}: image")


def test_added_noise_and_loss(folder, unet_model, expected):
    config, params = unet_model
    schedule = diffusers.load_schedule(folder / "scheduler")
    timesteps = expected["unet/timesteps"]
    noisy = add_noise(schedule, expected["unet/sample"], expected["train/noise"], timesteps)
    close(noisy, expected["train/noisy"], "noisy")
    eps = unet.apply(params, noisy, timesteps, expected["unet/condition"], config=config)
    close(jnp.square(eps - expected["train/noise"]).mean()[None], expected["train/mse"], "loss")
