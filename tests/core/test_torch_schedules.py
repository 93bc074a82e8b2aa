"""Every schedule of torch drives our optimizers as it drives `torch.optim.AdamW`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from torch_database import LIKE_TORCH, Problem

SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "constant": lr_scheduler.ConstantLR,
    "linear": lr_scheduler.LinearLR,
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "polynomial": lr_scheduler.PolynomialLR,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    # These two cycle `betas` as well.
    "cyclic, with betas": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8, three_phase=True),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "averaging": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


@pytest.mark.parametrize("subject", LIKE_TORCH, ids=lambda one: one.name)
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_drives_it_and_resumes(subject, name, rate):
    ours, theirs = Problem.make(), Problem.make()
    optimizer = subject(ours.parameters, lr=copy.copy(rate))
    reference = torch.optim.AdamW(theirs.parameters, lr=float(rate))
    make = SCHEDULES[name]
    scheduler, expected = make(optimizer), make(reference)
    for step in range(7):
        if step == 4:
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            ours = ours.copy()
            optimizer = subject(ours.parameters, lr=copy.copy(rate))
            scheduler = make(optimizer)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        for problem, one, schedule in (
            (ours, optimizer, scheduler),
            (theirs, reference, expected),
        ):
            problem.run(one, 1)
            schedule.step(*((1.0,) if name == "plateau" else ()))
        wanted = reference.param_groups[0]
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(wanted["lr"], rel=1e-6)
            assert tuple(group["betas"]) == tuple(wanted["betas"])
    torch.testing.assert_close(ours.values(), theirs.values())
