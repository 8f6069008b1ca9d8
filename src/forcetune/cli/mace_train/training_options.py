"""Options of ``mace_run_train`` about loss and optimisation, and of the MMEA code about its gates."""

from __future__ import annotations

from forcetune.cli.mace_train.option import MaceOption, ignored, mapped, refused

_FACTORS = ("embedding", "interactions", "products", "readouts")
_DIPOLES = "belongs to losses of dipoles, which are refused"
_STAGE_TWO = "`training.second_stage.{}`".format

TRAINING_OPTIONS: tuple[MaceOption, ...] = (
    mapped(
        "--loss",
        "text",
        "weighted",
        "`training.loss`, see below",
        choices=(
            *("ef", "weighted", "forces_only", "virials", "stress", "dipole", "dipole_polar", "huber", "universal"),
            *("energy_forces_dipole", "l1l2energyforces"),
        ),
    ),
    mapped("--forces_weight", "float", 100.0, "`training.loss.forces`"),
    mapped("--swa_forces_weight --stage_two_forces_weight", "float", 100.0, _STAGE_TWO("loss.forces")),
    mapped("--energy_weight", "float", 1.0, "`training.loss.energy`"),
    mapped("--swa_energy_weight --stage_two_energy_weight", "float", 1000.0, _STAGE_TWO("loss.energy")),
    mapped("--stress_weight", "float", 1.0, "`training.loss.stress`, with a loss that has stress"),
    mapped("--swa_stress_weight --stage_two_stress_weight", "float", 10.0, _STAGE_TWO("loss.stress")),
    mapped("--virials_weight", "float", 1.0, "`training.loss.stress`, with --loss virials"),
    mapped(
        "--swa_virials_weight --stage_two_virials_weight",
        "float",
        10.0,
        f"{_STAGE_TWO('loss.stress')}, with --loss virials",
    ),
    ignored("--dipole_weight", "float", 1.0, _DIPOLES),
    ignored("--swa_dipole_weight --stage_two_dipole_weight", "float", 1.0, _DIPOLES),
    ignored("--swa_polarizability_weight --stage_two_polarizability_weight", "float", 1.0, _DIPOLES),
    ignored("--polarizability_weight", "float", 1.0, _DIPOLES),
    mapped(
        "--config_type_weights",
        "text",
        '{"Default":1.0}',
        "refused where a weight is not 1: write `config_weight=` into the frames, which both programs read",
    ),
    mapped("--huber_delta", "float", 0.01, "`training.loss.huber_delta`"),
    mapped(
        "--optimizer",
        "text",
        "adam",
        "`training.optimizer`; adamw is without amsgrad here",
        choices=("adam", "adamw", "schedulefree"),
    ),
    refused("--beta", "float", 0.9, "β₁ is 0.9; leave it out"),
    refused("--beta1_schedulefree", "float", 0.9, "β₁ is 0.9; leave it out"),
    mapped("--beta2_schedulefree", "float", 0.98, "only 0.999 is accepted, which is what schedulefree has here"),
    mapped("--batch_size", "int", 10, "`training.batch_size`; the last, smaller batch of an epoch is trained on, too"),
    ignored("--valid_batch_size", "int", 10, "it changes no result"),
    mapped("--lr", "float", 0.01, "`training.learning_rate`"),
    mapped("--swa_lr --stage_two_lr", "float", 1e-3, _STAGE_TWO("learning_rate")),
    mapped("--weight_decay", "float", 5e-7, "`training.weight_decay`"),
    refused(
        "--lr_params_factors",
        "text",
        "{" + ", ".join(f'"{part}_lr_factor": 1.0' for part in _FACTORS) + "}",
        "there is one learning rate; leave it out, or train a part of the model by --freeze or --set method.target=…",
    ),
    mapped(
        "--freeze",
        "int",
        None,
        "`method.target`: 1 to 4 leave the embedding as it is, 5 the interactions, too, 6 the products, too; with "
        "method `full`, if none is given; 0 and less freeze nothing, as in mace",
    ),
    ignored("--amsgrad", "set", True, "adam is always with amsgrad, in mace, too"),
    mapped(
        "--scheduler",
        "text",
        "ReduceLROnPlateau",
        "`training.schedule.name`: `plateau`; ExponentialLR is `constant` with a gamma of 1 and refused otherwise",
    ),
    mapped("--lr_factor", "float", 0.8, "`training.schedule.factor`"),
    mapped(
        "--scheduler_patience",
        "int",
        50,
        "`training.schedule.patience`, divided by --eval_interval: mace counts epochs, forcetune validations",
    ),
    mapped("--lr_scheduler_gamma", "float", 0.9993, "see --scheduler"),
    mapped(
        "--swa --stage_two",
        "set",
        False,
        "a second stage, whose best adapter is kept; mace writes models of both stages, without averages, too",
    ),
    mapped(
        "--start_swa --start_stage_two",
        "int",
        None,
        "`training.second_stage.start`, one more as epochs count from 1; three quarters of the epochs if not given",
    ),
    refused("--lbfgs", "set", False, "forcetune ends a run with L-BFGS: `--set training.refine=20` instead"),
    mapped("--ema", "set", False, "`training.ema`"),
    mapped("--ema_decay", "float", 0.99, "`training.ema`"),
    mapped("--max_num_epochs", "int", 2048, "`training.epochs`"),
    mapped("--patience", "int", 2048, "`training.early_stopping`"),
    mapped("--eval_interval", "int", 1, "`training.valid_every`"),
    mapped("--clip_grad", "float or None", 10.0, "`training.clip`"),
    mapped("--lora", "bool", False, "`method.name`: `lora`"),
    mapped("--lora_rank", "int", 4, "`method.rank`, with --lora"),
    mapped("--lora_alpha", "float", 1.0, "`method.alpha`, with --lora"),
    mapped(
        "--mmea_init",
        "text",
        None,
        "`method.shift_init`: 0 for `zero`, --mmea_std for `normal`; the MMEA code reads it and uses it nowhere",
        choices=("zero", "normal"),
        origin="MMEA",
    ),
    mapped("--mmea_std", "float", 1e-3, "`method.shift_init`, with `--mmea_init normal`", origin="MMEA"),
)
