from __future__ import annotations

import torch

from megalm.checkpoint.tensor_files import DynamicLossScaler, snapshot


def test_a_copy_keeps_what_training_changes_afterwards() -> None:
    scaler, weight = DynamicLossScaler(), torch.zeros(2)
    scaler.cur_iter = 3  # type: ignore[attr-defined]
    taken = snapshot({"loss_scaler": scaler, "groups": [{"weight": weight}]}, copy=True)
    scaler.cur_iter = 4  # type: ignore[attr-defined]
    weight += 1
    assert vars(taken["loss_scaler"]) == {"cur_iter": 3}
    assert taken["groups"][0]["weight"].tolist() == [0.0, 0.0]
