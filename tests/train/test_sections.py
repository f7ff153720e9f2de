"""Where metrics are shown."""

from emu_jax.train.sections import tag


def test_every_metric_has_its_section():
    expected = {
        "1_learning": ("loss", "text_loss/images", "regression_loss", "variance_fraction", "effective_rank", "kl"),
        "2_held_out": ("held_out_loss", "held_out_text_loss/images", "held_out_captions_right"),
        "3_norms": ("grad_norm", "update_norm/llama", "param_norm/vision", "grad_norm_ratio", "bad_steps_in_a_row"),
        "4_schedule": ("learning_rate/llama", "ema_decay"),
        "5_data": ("documents", "documents_web", "split_documents", "pad_fraction", "slot_occupancy", "read_share"),
        "6_speed": ("tokens_per_s", "useful_gflop_per_s", "step_ms", "compile_s", "mfu", "useful_mfu", "memory_gb"),
    }
    assert {section: tuple(f"{section}/{name}" for name in names) for section, names in expected.items()} == {
        section: tuple(map(tag, names)) for section, names in expected.items()
    }
