"""Assignments as data: from patterns, decisions, files and controls."""

import time
from itertools import combinations

import pytest
import torch
import yaml

import molf
from checkpoints import make_model
from molf import AssignedLayer, Assignment
from molf.core.assignment.assigned import LORA
from molf.core.assignment.layout import Layout
from molf.core.assignment.patterns import matching
from molf.core.assignment.text import to_text

IDS = torch.arange(20).reshape(2, 10)
NAMES = [
    f"model.layers.{number}.{part}"
    for number in (0, 1)
    for part in (
        *(f"self_attn.{kind}_proj" for kind in "qkvo"),
        *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2")


def kinds(assignment):
    return {name: layer.train for name, layer in assignment.layers.items()}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("k_proj", ["a.0.k_proj", "a.11.k_proj"]),
        ("proj", []),
        ("a.[0-3]", ["a.0.k_proj", "a.0.b.up", "a.2.b.up"]),
        ("a.[0,11]", ["a.0.k_proj", "a.11.k_proj", "a.0.b.up"]),
        ("a.[9-12].k_proj", ["a.11.k_proj"]),
        ("1[0-1]", ["a.11.k_proj"]),
        ("b.*", ["a.0.b.up", "a.2.b.up"]),
        ("a.*.up", []),
        ("*_proj", ["a.0.k_proj", "a.11.k_proj"]),
        ("0.b", ["a.0.b.up"]),
        ("a.0", ["a.0.k_proj", "a.0.b.up"]),
        ("k.proj", []),
    ],
)
def test_a_pattern_is_a_run_of_whole_components(pattern, expected):
    names = ["a.0.k_proj", "a.11.k_proj", "a.0.b.up", "a.2.b.up"]
    assert matching(pattern, names) == [name for name in names if name in expected]


def test_frozen_wins_over_full_and_full_over_lora(model):
    lora = [
        {"r": 8, "alpha": 32, "modules": ["q_proj", "o_proj", "up_proj"]},
        {"r": 4, "modules": ["mlp.*"]},
    ]
    made = Assignment.from_patterns(
        model, {"full": ["k_proj", "v_proj"], "lora": lora, "frozen": ["model.layers.0"]}
    )
    assert list(made.layers) == NAMES
    first, second = NAMES[:7], NAMES[7:]
    assert {made[name].train for name in first} == {"frozen"}
    treatments = [(made[name].train, made[name].r, made[name].alpha) for name in second]
    wide, narrow, full = ("lora", 8, 32.0), ("lora", 4, 8.0), ("full", None, None)
    assert treatments == [wide, full, full, wide, narrow, wide, narrow]
    # The pattern of frozen names whole decoder layers: what else is in them, too.
    assert made.frozen_rest == tuple(
        name
        for name, _ in model.named_parameters()
        if name.startswith("model.layers.0.") and not name.endswith("_proj.weight")
    )
    assert made.share == pytest.approx(2 * 16 * 32 / sum(x.weights for x in made.entries))


def test_default_and_the_line_without_it(model, recwarn):
    for default, expected in (
        ("full", ("full", None, None)),
        ("frozen", ("frozen", None, None)),
        ("lora", ("lora", 4, 6.0)),
        ({"r": 2, "alpha": 5}, ("lora", 2, 5.0)),
    ):
        given = {"lora": {"r": 4, "alpha": 6, "modules": "q_proj"}, "default": default}
        layer = Assignment.from_patterns(model, given)["model.layers.1.mlp.up_proj"]
        assert (layer.train, layer.r, layer.alpha) == expected
    assert not recwarn.list
    with pytest.warns(UserWarning, match="10 of 14 layers are named by no pattern") as found:
        Assignment.from_patterns(model, {"full": ["k_proj", "v_proj"]})
    assert "\n" not in str(found[0].message)


def test_default_alpha_gives_a_scaling_of_two(model):
    for use_rslora in (False, True):
        given = {"lora": {"r": 16, "modules": "mlp"}, "use_rslora": use_rslora, "default": "full"}
        layer = Assignment.from_patterns(model, given)["model.layers.0.mlp.up_proj"]
        assert layer.scaling(use_rslora=use_rslora) == 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"full": ["x_proj"]}, "full pattern 'x_proj': it matches no linear layer"),
        ({"full": ["up"]}, "matches no linear layer"),
        ({"full": ["norm"]}, "model.norm.weight is no linear layer"),
        ({"lora": {"r": 4, "modules": ["embed_tokens"]}}, "embed_tokens.weight is no linear layer"),
        ({"frozen": ["no_such"]}, "frozen pattern 'no_such'"),
        (
            {"full": ["mlp"], "lora": {"r": 4, "modules": ["up_proj"]}},
            r"lora pattern 'up_proj': other patterns \(full\) took all its 2 layers",
        ),
        (
            {"frozen": ["layers"], "full": ["lm_head", "q_proj"]},
            r"\(frozen\) took all its 2 layers",
        ),
        ({"lora": {"r": 33, "modules": ["q_proj"]}}, "r=33 exceeds its smaller side, 32"),
        ({"lora": {"r": 0, "modules": ["q_proj"]}}, "invalid r=0"),
        ({"lora": {"r": True, "modules": ["q_proj"]}}, "invalid r=True"),
        ({"lora": {"r": 4, "alpha": -1, "modules": ["q_proj"]}}, "invalid alpha=-1"),
        ({"lora": {"r": 4, "alpha": "1e1", "modules": ["q_proj"]}}, "a positive, finite number"),
        ({"lora": {"r": 4, "alpha": 10**400, "modules": ["q_proj"]}}, "invalid alpha=10000"),
        ({"lora": {"r": 10**308, "modules": ["q_proj"]}}, "invalid alpha=inf"),
        ({"default": {"r": 10**400}}, "invalid r=10000"),
        ({"lora": {"modules": ["q_proj"]}}, "it has no rank"),
        ({"lora": {"r": 4}}, "Invalid lora modules=None"),
        ({"lora": {"r": 4, "rank": 4, "modules": ["q_proj"]}}, "unknown 'rank'"),
        ({"lora": "q_proj"}, "Must be a mapping of r, alpha, modules, or a list of these"),
        ({"full": []}, "Must be one or more patterns"),
        ({"full": [3]}, "Invalid pattern 3"),
        ({"full": ["layers..mlp"]}, "Must be whole components"),
        ({"full": ["layers.[0-x]"]}, "must hold numbers and ranges"),
        ({"full": ["layers.[3-0]"]}, "must hold numbers and ranges"),
        ({"full": ["layers.[0"]}, "a bracket has no partner"),
        ({"full": ["mlp"], "default": "lora"}, "Invalid default='lora'"),
        ({"full": ["mlp"], "freeze_rest": "yes"}, "Invalid freeze_rest='yes'"),
        ({"ful": ["mlp"]}, "unknown 'ful'"),
        ({}, "No pattern is given"),
        (["mlp"], "Must be a mapping"),
    ],
)
def test_wrong_patterns(model, patterns, message):
    with pytest.raises(ValueError, match=message) as error:
        Assignment.from_patterns(model, patterns)
    assert "\n" not in str(error.value)


def test_the_head_is_a_layer_only_if_it_is_named():
    model = make_model("llama")
    given = {"full": ["k_proj"], "default": {"r": 4}}
    assert "lm_head" not in Assignment.from_patterns(model, given).layers
    given["full"] = ["k_proj", "lm_head"]
    assert Assignment.from_patterns(model, given)["lm_head"].train == "full"
    frozen = Assignment.from_patterns(model, {**given, "full": "k_proj", "frozen": ["lm_head"]})
    assert "lm_head" not in frozen.layers
    assert frozen.frozen_rest == ("lm_head.weight",)


def test_conv1d_shapes_are_out_x_in():
    made = Assignment.from_patterns(make_model("gpt2"), {"full": ["c_attn"], "default": "frozen"})
    assert made["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert made["transformer.h.1.mlp.c_proj"].shape == (32, 128)


def test_yaml_gives_the_assignment_back(model):
    lora = [{"r": 8, "alpha": 3.5, "modules": ["q_proj"]}, {"r": 4, "modules": ["mlp"]}]
    given = {
        "full": ["k_proj"],
        "lora": lora,
        "frozen": ["1.mlp", "embed_tokens"],
        "default": "full",
    }
    for flags in ({}, {"use_rslora": True, "freeze_rest": True}):
        made = Assignment.from_patterns(model, {**given, **flags})
        text = made.to_yaml()
        assert Assignment.from_yaml(text) == made == Assignment.from_yaml(text, model)
        assert hash(Assignment.from_yaml(text)) == hash(made)
        # One line per layer, which a person edits.
        assert text.count("\n  model.layers.") == len(NAMES)
    edited = made.to_yaml().replace("{train: full, shape: 16x32}", "{train: lora, shape: 16x32}")
    layer = Assignment.from_yaml(edited, model)["model.layers.0.self_attn.k_proj"]
    assert (layer.train, layer.r, layer.alpha) == ("lora", 4, 4.0)


def test_yaml_may_hold_patterns(model):
    given = {"full": ["k_proj"], "lora": {"r": 4, "modules": ["mlp"]}, "default": "frozen"}
    text = yaml.safe_dump(given)
    assert Assignment.from_yaml(text, model) == Assignment.from_patterns(model, given)
    with pytest.raises(ValueError, match="has patterns instead of layers"):
        Assignment.from_yaml(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("layers:", "layers: 3\nother:"), "unknown 'other'"),
        (("{train: full, shape: 16x32}", "{train: ful, shape: 16x32}"), "invalid train='ful'"),
        (("{train: full, shape: 16x32}", "{train: full, r: 4, shape: 16x32}"), "only lora has r"),
        (("{train: full, shape: 16x32}", "{train: full}"), "invalid shape=None"),
        (("{train: full, shape: 16x32}", "{train: lora, r: 17, shape: 16x32}"), "smaller side, 16"),
        (("{train: full, shape: 16x32}", "{train: full, rank: 1}"), "Must be a mapping of train"),
        (("{train: full, shape: 16x32}", "[full"), r"no YAML \(line"),
        (("lora: {r: 4, alpha: 8.0}", "lora: 4"), "Invalid lora=4"),
        (("lora: {r: 4, alpha: 8.0}", "lora: {}"), "lora has no rank"),
        (("lora: {r: 4, alpha: 8.0}", f"lora: {{r: 1{'0' * 400}}}"), "invalid r=10000"),
        (("layers:", "layers:\n  1: {train: full, shape: 4x4}"), "Invalid layer 1: a name must be"),
        (("use_rslora: false", "use_rslora: !!bool maybe"), "no YAML: a value cannot be converted"),
        (("use_rslora: false", "source: !!timestamp soon"), "no YAML: a value cannot be converted"),
        (("use_rslora: false", 'source: "\\UFFFFFFFF"'), "no YAML: a value cannot be converted"),
        (("use_rslora: false", "use_rslora: 1"), "Invalid use_rslora=1"),
        (("{train: full, shape: 16x32}", "{shape: 16x32}"), "k_proj has no train. Must be full"),
        (("  model.layers.1.mlp.up", "  model.layers.0.mlp.up"), r"up_proj' is given twice \(line"),
        (("{train: full, shape: 16x32}", "{train: lora, train: full, shape: 16x32}"), "'train' is"),
    ],
)
def test_wrong_yaml(model, change, message):
    given = {"full": ["k_proj"], "lora": {"r": 4, "modules": ["mlp"]}, "default": "frozen"}
    text = Assignment.from_patterns(model, given).to_yaml()
    assert change[0] in text
    with pytest.raises(ValueError, match=message) as error:
        Assignment.from_yaml(text.replace(*change))
    assert "\n" not in str(error.value)


def test_an_empty_rank_is_that_of_all_lines_with_its_alpha(model):
    given = {"lora": {"r": 4, "alpha": 100, "modules": ["mlp"]}, "default": "frozen"}
    made = Assignment.from_patterns(model, given)
    for entry in ("r: ", "r: null", "alpha: null", "r: 4, alpha: 100"):
        edited = made.to_yaml().replace("{train: lora", f"{{train: lora, {entry}")
        assert Assignment.from_yaml(edited) == made, entry
    own = Assignment.from_yaml(made.to_yaml().replace("{train: lora", "{train: lora, r: 4"))
    assert {(layer.r, layer.alpha) for layer in own.lora} == {(4, 8.0)}


def test_evidence_of_a_file_holds_numbers(model):
    made = Assignment.from_patterns(model, {"full": ["k_proj"], "default": "frozen"})
    text = f"{made.to_yaml()}evidence:\n  {NAMES[0]}: {{decisions: 1, wins: {{full: 1}}, margin: "
    assert Assignment.from_yaml(f"{text}1.0}}")[NAMES[0]].evidence.margin == 1
    for margin in (f"1{'0' * 400}", ".inf", "x"):
        with pytest.raises(ValueError, match="Invalid margin="):
            Assignment.from_yaml(f"{text}{margin}}}")


def test_a_name_of_patterns_may_not_come_twice(model):
    """YAML would keep the last one alone."""
    with pytest.raises(ValueError, match=r"'full' is given twice \(line 3\)"):
        Assignment.from_yaml("full: [k_proj]\ndefault: frozen\nfull: [q_proj]\n", model)
    text = "lora: [&a {r: 2, modules: [q_proj]}]\ndefault: {r: 2}\n"
    assert len(Assignment.from_yaml(text, model).lora) == len(NAMES)


def test_another_model_is_refused_by_its_layers(model):
    made = Assignment.from_patterns(model, {"full": ["k_proj"], "default": "frozen"})
    for other, message in (
        (make_model("qwen2", num_hidden_layers=1), "the model has no model.layers.1.self_attn.q_p"),
        (make_model("qwen2", num_hidden_layers=3), "the assignment has no model.layers.2.self_att"),
        (make_model("qwen2", intermediate_size=64), "gate_proj is 48x32 there and 64x32 here"),
        (make_model("gpt2"), "the model has no model.layers.0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Assignment.from_yaml(made.to_yaml(), other)
        assert "\n" not in str(error.value)
    made.check(Layout.of(make_model("llama")))  # the head and biases are no part of it


def routed(lora_lr=1e-3, steps=3, **options):
    model = make_model("qwen2")
    config = molf.MoLFConfig(ranks=(2, 8), **options)
    optimizer = molf.MoLFAdamW.from_model(model, config, lr=1e-3, lora_lr=lora_lr)
    decisions = []
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decisions.append(optimizer.routing)
    return model, optimizer, decisions


def test_of_an_optimizer_by_wins():
    model, optimizer, decisions = routed(lora_lr=2e-4, score="random", top_k=1, steps=5)
    made = Assignment.of(optimizer)
    made.check(Layout.of(model))
    assert {layer.train for layer in made.entries} == {"full", "lora"}
    for name, layer in made.layers.items():
        won = [step[name].winners[0] for step in decisions]
        wins = {expert: won.count(expert) for expert in ("full", "lora0_r2", "lora1_r8")}
        assert dict(layer.evidence.wins) == wins
        changes = [i for i in range(1, 5) if won[i] != won[i - 1]]
        assert layer.evidence.changes == len(changes)
        assert layer.evidence.last_change == (changes[-1] + 1 if changes else None)
        most = max(wins, key=wins.get)
        assert layer.train == ("full" if most == "full" else "lora")
        assert layer.r == {"full": None, "lora0_r2": 2, "lora1_r8": 8}[most]
        if layer.train == "lora":  # the default, alpha 32 with rank-stabilised scaling
            assert layer.alpha == 32
        scores = [step[name].scores for step in decisions]
        margins = [
            (one["full"] - lora) / (one["full"] + lora)
            for one in scores
            if (lora := max(one["lora0_r2"], one["lora1_r8"])) is not None
        ]
        assert layer.evidence.margin == pytest.approx(sum(margins) / 5, abs=1e-6)
    assert Assignment.from_yaml(made.to_yaml(), model) == made


def test_of_an_optimizer_by_share():
    _, optimizer, _ = routed()
    made = Assignment.of(optimizer, share=0.3)
    margins = {layer.name: layer.evidence.margin for layer in made.entries}
    leading = sorted(margins, key=lambda name: -margins[name])[: round(0.3 * 14)]
    assert {layer.name for layer in made.full} == set(leading)
    for share in (0, 1, "a", True):
        with pytest.raises(ValueError, match="Invalid share"):
            Assignment.of(optimizer, share=share)


def test_what_was_not_routed_keeps_its_training():
    model = make_model("qwen2")
    model.model.norm.weight.requires_grad_(False)
    config = molf.MoLFConfig(ranks=(2,), exclude_modules=("lm_head", "down_proj"))
    optimizer = molf.MoLFAdamW.from_model(model, config, lr=1e-3)
    with pytest.raises(ValueError, match="No step was taken"):
        Assignment.of(optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    made = Assignment.of(optimizer)
    assert kinds(made)["model.layers.1.mlp.down_proj"] == "full"  # trained by plain AdamW
    assert made["model.layers.1.mlp.down_proj"].evidence is None
    assert (made.freeze_rest, made.frozen_rest) == (False, ("model.norm.weight",))
    with pytest.raises(TypeError, match="Must be molf"):
        Assignment.of(torch.optim.AdamW(model.parameters()))


def test_stacked_projections_that_were_not_routed_keep_their_training():
    """The weight of q, k and v of nn.MultiheadAttention has a name of its own."""
    model = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
    config = molf.MoLFConfig(ranks=(2,), exclude_modules=("in_proj",))
    optimizer = molf.MoLFAdamW.from_model(model, config, lr=1e-2)
    x = torch.randn(3, 8)
    model["attention"](x, x, x)[0].square().mean().backward()
    optimizer.step()
    assert Assignment.of(optimizer)["attention.in_proj"].train == "full"


def test_a_frozen_rest_stays_frozen():
    model, optimizer, _ = routed(freeze_rest=True)
    made = Assignment.of(optimizer)
    assert (made.freeze_rest, made.frozen_rest) == (True, ())
    del model
    alone = Assignment.of(optimizer)
    assert (alone.entries, alone.freeze_rest) == (made.entries, True)


def test_the_counts_are_part_of_the_optimizer_state(tmp_path):
    model, optimizer, _ = routed(score="random")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, again, _ = routed(steps=0, score="random")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.evidence == optimizer.evidence
    for one in (optimizer, again):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for group, source in zip(one.param_groups, optimizer.param_groups, strict=True):
            for parameter, other in zip(group["params"], source["params"], strict=True):
                parameter.grad = other.grad.clone()
    again.step()
    optimizer.step()
    assert again.evidence == optimizer.evidence
    assert {one.decisions for one in again.evidence.values()} == {4}


def test_random_like_has_as_many_weights_in_full_and_every_set_alike(model):
    given = {"full": ["0.self_attn.q_proj"], "default": {"r": 4}, "frozen": ["1.mlp"]}
    made = Assignment.from_patterns(model, given)
    wanted = sum(layer.weights for layer in made.full)
    movable = [layer for layer in made.entries if layer.train != "frozen"]
    sets = {
        frozenset(layer.name for layer in some)
        for size in range(len(movable) + 1)
        for some in combinations(movable, size)
        if sum(layer.weights for layer in some) == wanted
    }
    assert len(sets) == 10  # one of four matrices of 32x32, or two of four of 16x32
    drawn = [made.random_like(seed) for seed in range(300)]
    found = [frozenset(layer.name for layer in one.full) for one in drawn]
    counts = {some: found.count(some) for some in sets}
    assert sum(counts.values()) == 300
    assert min(counts.values()) > 10
    assert made.random_like(5) == made.random_like(5)
    for one in drawn[:20]:
        assert [x.name for x in one.frozen] == [x.name for x in made.frozen]
        assert {(x.r, x.alpha) for x in one.lora} == {(4, 8.0)}


def test_a_rank_above_a_layers_side_becomes_that(model):
    """k_proj and v_proj are [16, 32]; the scaling stays."""
    config = molf.MoLFConfig(ranks=(20,), alpha=10, use_rslora=False)
    shaped = Assignment.from_patterns(model, {"default": "full"}).by_shape(config, lora_lr=100.0)
    plain = make_model("qwen2")
    options = {"ranks": (20,), "alpha": 10, "use_rslora": False, "score": "lora"}
    optimizer = molf.MoLFAdamW.from_model(plain, molf.MoLFConfig(**options), lr=1e-3)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for made in (shaped, Assignment.of(optimizer)):
        assert len(made.lora) == len(NAMES)
        for layer in made.lora:
            assert layer.r == min(20, *layer.shape)
            assert layer.scaling(use_rslora=made.use_rslora) == pytest.approx(0.5)
        assert Assignment.from_yaml(made.to_yaml()) == made


def test_random_like_gives_small_layers_an_adapter_that_fits(model):
    lora = {"r": 20, "alpha": 40, "modules": ["q_proj", "o_proj", "mlp"]}
    given = {"full": ["k_proj"], "frozen": ["v_proj"], "lora": lora}
    made = Assignment.from_patterns(model, given)
    drawn = [made.random_like(seed) for seed in range(8)]
    small = [x for one in drawn for x in one.lora if x.name.endswith("k_proj")]
    assert {(layer.r, layer.alpha) for layer in small} == {(16, 32.0)}


def test_random_like_without_another_set(model):
    made = Assignment.from_patterns(model, {"full": ["layers"]})
    with pytest.warns(UserWarning, match="No other set of layers"):
        assert made.random_like(1).full == made.full


def test_by_shape_refuses_the_configuration_of_the_model(model):
    made = Assignment.from_patterns(model, {"default": "full"})
    with pytest.raises(TypeError, match=r"Qwen2Config\. Must be a molf\.MoLFConfig"):
        made.by_shape(model.config)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lr": 0}, "Invalid lr=0. Must be positive and finite"),
        ({"lr": -1.0}, "Invalid lr=-1"),
        ({"lr": float("nan"), "lora_lr": 1.0}, "Invalid lr=nan"),
        ({"lora_lr": float("inf")}, "Invalid lora_lr=inf"),
        ({"lora_lr": 0}, "Invalid lora_lr=0"),
        ({"lr": "1e-4", "lora_lr": 1.0}, "Invalid lr='1e-4'"),
        ({"lr": 10**400}, "Invalid lr=10000"),
    ],
)
def test_by_shape_refuses_wrong_rates(model, rates, message):
    made = Assignment.from_patterns(model, {"default": "full"})
    with pytest.raises(ValueError, match=message):
        made.by_shape(molf.MoLFConfig(ranks=4), **rates)


def test_by_shape_is_the_formula(model):
    made = Assignment.from_patterns(model, {"default": "full", "frozen": ["0.mlp"]})
    config = molf.MoLFConfig(ranks=(4,), alpha=8, use_rslora=False)
    ratio = 1.6
    predicted = made.by_shape(config, lr=1e-3, lora_lr=ratio * 1e-3)
    for name, layer in predicted.layers.items():
        out, into = layer.shape
        full = 1 / ratio * 3**0.5 / 2 * (into + out) / out > 1
        expected = "frozen" if "0.mlp" in name else "full" if full else "lora"
        assert layer.train == expected, name
    assert {layer.train for layer in predicted.entries} == {"frozen", "full", "lora"}
    assert {(layer.r, layer.alpha) for layer in predicted.lora} == {(4, 8.0)}
    assert not predicted.use_rslora
    # It is what the optimizer's score of this name chooses.
    model, optimizer, _ = routed(steps=1, score="shape")
    own = made.by_shape(molf.MoLFConfig(ranks=(2, 8)))
    chosen = Assignment.of(optimizer)
    assert {n: k for n, k in kinds(chosen).items() if "0.mlp" not in n}.items() <= kinds(
        own
    ).items()


def test_print(model):
    made = Assignment.from_patterns(
        model, {"full": ["k_proj"], "lora": {"r": 4, "modules": ["mlp"]}, "default": "frozen"}
    )
    assert str(made) == (
        "14 layers: 2 full (6.7% of the layers' weights), 6 lora (r 4), 6 frozen; the rest is "
        "trained"
    )


def test_the_commonest_adapter_of_many_is_found_at_once(monkeypatch):
    monkeypatch.setattr("molf.core.assignment.text._flow", str)
    layers = [
        AssignedLayer(name=f"a.{i}", shape=(8, 8), train=LORA, r=4 if i % 3 else 2, alpha=8.0)
        for i in range(20_000)
    ]
    started = time.process_time()
    none = {"model": "", "source": "", "frozen_rest": ()}
    text = to_text(layers, use_rslora=False, freeze_rest=False, **none)
    assert time.process_time() - started < 1
    assert "lora: {'r': 4, 'alpha': 8.0}" in text
