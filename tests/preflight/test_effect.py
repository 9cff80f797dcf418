from rlhf_lightning.preflight.effect import check_effect


def test_every_setting_that_does_nothing_is_in_the_line_and_none_is_right() -> None:
    assert check_effect([]).status == "ok"
    found = check_effect(["gamma=0.9 counts only with advantage=gae", "lam=1.0 counts only with advantage=gae"])
    assert found.status == "warning"
    assert "gamma=0.9" in found.measured
    assert "lam=1.0" in found.measured
