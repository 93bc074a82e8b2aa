"""Training with an assignment: the model, its optimizer, and what both reduce to."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import molf
from checkpoints import make_model
from core_helpers import Conv1D, tiny_model
from molf import Assignment

IDS = torch.arange(40).reshape(4, 10) % 37
PATTERNS = {
    "full": ["k_proj", "v_proj"],
    "lora": [
        {"r": 6, "alpha": 5, "modules": ["q_proj", "o_proj"]},
        {"r": 2, "alpha": 9, "modules": ["1.mlp"]},
    ],
    "frozen": ["0.mlp"],
}
RATES = {"lr": 1e-2, "lora_lr": 3e-2, "weight_decay": 0.2, "lora_weight_decay": 0.05}
LORA = {"r": 4, "alpha": 6}


def backward(model, step=0):
    ids = IDS.roll(step, 1)
    model(input_ids=ids, labels=ids).loss.backward()


def train(model, optimizer, steps=4):
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assigned(patterns=PATTERNS, architecture="qwen2", dtype=torch.float32, **options):
    model = make_model(architecture).to(dtype)
    assignment = Assignment.from_patterns(model, patterns)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All .* layers are")
        return molf.with_assignment(model, assignment, **options), assignment


def build(model, assignment, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*PEFT's save_pretrained")
        return molf.AdamW.from_assignment(model, assignment, **{**RATES, **options})


def plain_name(name):
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def test_the_model_is_trained_as_assigned():
    model, assignment = assigned()
    assert isinstance(model, peft.PeftModel)
    tuners = {
        plain_name(name): module for name, module in model.named_modules() if hasattr(module, "r")
    }
    assert set(tuners) == {layer.name for layer in assignment.lora}
    for name, tuner in tuners.items():
        layer = assignment[name]
        assert tuner.r["default"] == layer.r == {"q": 6, "o": 6}.get(name[-6], 2)
        assert tuner.scaling["default"] == layer.alpha / layer.r
    frozen = {f"{x.name}.weight" for x in (*assignment.lora, *assignment.frozen)}
    for name, parameter in model.named_parameters():
        is_adapters = ".lora_" in name
        assert parameter.requires_grad == (is_adapters or plain_name(name) not in frozen), name


def test_options_of_the_adapter():
    patterns = {**PATTERNS, "use_rslora": True}
    model, assignment = assigned(patterns, use_dora=True, lora_dropout=0.25)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    assert q.scaling["default"] == 5 / 6**0.5
    assert q.lora_dropout["default"].p == 0.25
    magnitude = q.lora_magnitude_vector["default"].weight
    optimizer = build(model, assignment)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(1e-2, 0.2), (1e-2, 0.0), (3e-2, 0.05), (3e-2, 0.0)]
    assert any(p is magnitude for p in optimizer.param_groups[3]["params"])
    before = magnitude.clone()
    train(model, optimizer)
    assert not torch.equal(before, magnitude)
    with pytest.raises(ValueError, match=r"Invalid lora_dropout=1. Must be in \[0, 1\)"):
        assigned(lora_dropout=1)


def test_frozen_layers_get_no_gradient_and_no_state():
    model, assignment = assigned({**PATTERNS, "frozen": ["0.mlp", "embed_tokens"]})
    optimizer = build(model, assignment)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    still = {f"{x.name}.weight" for x in (*assignment.lora, *assignment.frozen)}
    still.add("model.embed_tokens.weight")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (plain_name(name) in still), name
    optimizer.step()
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        # In the first step B is zero, so A does not move but by its decay.
        assert torch.equal(before[name], parameter) == (plain_name(name) in still), name


def test_all_full_is_full_fine_tuning_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model, assignment = assigned({"full": ["layers"]}, dtype=dtype)
        assert not isinstance(model, peft.PeftModel)
        dense = make_model("qwen2").to(dtype)
        norms = [p for n, p in dense.named_parameters() if p.dim() < 2]
        others = [p for n, p in dense.named_parameters() if p.dim() >= 2]
        groups = [
            {"params": others, "weight_decay": 0.2},
            {"params": norms, "weight_decay": 0.0},
        ]
        optimizers = [build(model, assignment), molf.AdamW(groups, lr=1e-2)]
        train(model, optimizers[0])
        train(dense, optimizers[1])
        for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
            assert torch.equal(one, other), name
        values = [optimizer.float32_weights() for optimizer in optimizers]
        for one, other in zip(model.parameters(), dense.parameters(), strict=True):
            if dtype == torch.bfloat16:
                assert torch.equal(values[0][one], values[1][other])


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_all_lora_is_pefts_lora_bit_for_bit(architecture, dropout):
    patterns = {"default": LORA, "freeze_rest": True}
    model, assignment = assigned(patterns, architecture, lora_dropout=dropout)
    plain = make_model(architecture)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules="all-linear",
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(7)
    lora = peft.get_peft_model(plain, config)
    trained = [p for p in lora.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.05, fused=True)
    optimizer = build(model, assignment)
    for each, its_optimizer in ((model, optimizer), (lora, adamw)):
        torch.manual_seed(1)
        train(each, its_optimizer)
    for (name, one), (other, value) in zip(
        model.named_parameters(), lora.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(one, value), name


def test_the_first_step_is_that_of_both_methods_on_their_layers():
    """B is zero at the start, so all three models have the same gradients; in float64."""
    double = {"dtype": torch.float64}
    mixed, assignment = assigned(PATTERNS, **double)
    dense, all_full = assigned({"full": ["layers"]}, **double)
    lora, all_lora = assigned({"default": LORA, "freeze_rest": True}, **double)
    # The adapters start alike, with the ranks and alphas of the mixture.
    own = {name: p for name, p in mixed.named_parameters() if ".lora_" in name}
    for name, parameter in lora.named_parameters():
        if name in own:
            parameter.data = own[name].detach().clone()
            tuner = lora.get_submodule(name.split(".lora_")[0])
            layer = assignment[plain_name(name.split(".lora_")[0])]
            tuner.scaling["default"] = layer.alpha / layer.r
    trained = [p for n, p in lora.named_parameters() if n in own]
    decays = molf.AdamW(trained, lr=3e-2, weight_decay=0.05)
    for model, optimizer in (
        (mixed, build(mixed, assignment)),
        (dense, build(dense, all_full)),
        (lora, decays),
    ):
        backward(model)
        optimizer.step()
    assert all_lora.lora
    factors = dict(lora.named_parameters())
    weights = dict(dense.named_parameters())
    frozen = {f"{x.name}.weight" for x in (*assignment.lora, *assignment.frozen)}
    start = make_model("qwen2").double().state_dict()
    for name, parameter in mixed.named_parameters():
        if name in own:
            torch.testing.assert_close(parameter, factors[name], rtol=1e-12, atol=1e-15)
        elif plain_name(name) in frozen:
            assert torch.equal(parameter, start[plain_name(name)]), name
        else:
            torch.testing.assert_close(parameter, weights[plain_name(name)], rtol=1e-12, atol=1e-15)


class Twin(nn.Module):
    """A linear layer with `W + s B A` spelled out, of which autograd sees W, b, A and B."""

    def __init__(self, linear, factors=None, scaling=0.0):
        super().__init__()
        self.W = nn.Parameter(linear.weight.detach().clone())
        self.b = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.scaling = scaling
        if factors is not None:
            self.A, self.B = (nn.Parameter(factor.detach().clone()) for factor in factors)

    def forward(self, x):
        weight = self.W
        if self.scaling:
            weight = weight + self.scaling * self.B @ self.A
        y = x @ weight.t()
        return y if self.b is None else y + self.b


class LiteralAdamW:
    """AdamW with decoupled decay, one line per equation."""

    def __init__(self, settings):
        self.settings = settings  # parameter -> (rate, decay)
        self.m = {p: torch.zeros_like(p) for p in settings}
        self.v = {p: torch.zeros_like(p) for p in settings}
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for p, (lr, decay) in self.settings.items():
            g = p.grad
            self.m[p] = 0.9 * self.m[p] + 0.1 * g
            self.v[p] = 0.999 * self.v[p] + 0.001 * g * g
            p *= 1 - lr * decay
            root = (self.v[p] / (1 - 0.999**self.t)).sqrt()
            p -= lr * (self.m[p] / (1 - 0.9**self.t)) / (root + 1e-8)
            p.grad = None


def test_a_twin_takes_the_same_path():
    """Six steps of a mixture in float64, with explicit matrices and a literal AdamW."""
    model, assignment = assigned(PATTERNS, dtype=torch.float64)
    twin = make_model("qwen2").double()
    pairs, settings = [], {}
    for name, layer in assignment.layers.items():
        linear, factors, scaling = twin.get_submodule(name), None, 0.0
        if layer.train == "lora":
            tuner = model.get_submodule(f"base_model.model.{name}")
            factors = (tuner.lora_A["default"].weight, tuner.lora_B["default"].weight)
            scaling = layer.alpha / layer.r
        made = Twin(linear, factors, scaling)
        twin.set_submodule(name, made)
        if layer.train == "full":
            settings[made.W] = (1e-2, 0.2)
        if layer.train == "lora":
            settings |= {made.A: (3e-2, 0.05), made.B: (3e-2, 0.05)}
            pairs += zip((made.A, made.B), factors, strict=True)
        if made.b is not None:
            settings[made.b] = (1e-2, 0.0)
        base = f"base_model.model.{name}" + (".base_layer" if layer.train == "lora" else "")
        pairs.append((made.W, model.get_submodule(base).weight))
    for name, parameter in twin.named_parameters():
        if name.endswith("norm.weight"):
            settings[parameter] = (1e-2, 0.0)
        if name.endswith("embed_tokens.weight"):
            settings[parameter] = (1e-2, 0.2)
    pairs += [
        (twin.model.embed_tokens.weight, model.base_model.model.model.embed_tokens.weight),
        (twin.model.norm.weight, model.base_model.model.model.norm.weight),
    ]
    optimizer, literal = build(model, assignment), LiteralAdamW(settings)
    for step in range(6):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        twin.zero_grad()
        backward(twin, step)
        literal.step()
    for own, other in pairs:
        torch.testing.assert_close(own.detach(), other.detach(), rtol=1e-9, atol=1e-12)


def test_exact_bfloat16_follows_float32_steps():
    """Full layers keep their low halves, factors are float32; PEFT keeps the adapter so."""
    model, assignment = assigned(dtype=torch.bfloat16)
    optimizer = build(model, assignment)
    train(model, optimizer)
    exact = optimizer.float32_weights()
    weight = model.base_model.model.model.layers[0].self_attn.k_proj.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(exact[weight].bfloat16(), weight)
    assert not torch.equal(exact[weight], weight.float())
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert {p.dtype for p in factors} == {torch.float32}
    assert not set(factors) & set(exact)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_in_backward": True},
        {"state_dtype": "8bit"},
        {"nonfinite": "skip", "grad_accumulation_dtype": "float32"},
        {"weight_rounding": "stochastic", "seed": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_storage(options):
    if "state_dtype" in options:
        pytest.importorskip("torchao")
    model = make_model("llama", hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    assignment = Assignment.from_patterns(model, PATTERNS)
    model = molf.with_assignment(model, assignment)
    optimizer = build(model, assignment, **options)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    for group in optimizer.param_groups[2:]:
        assert group["state_dtype"] == "float32"
    if "state_dtype" in options:
        codes = [p for p, state in optimizer.state.items() if "exp_avg_codes" in state]
        assert {p.dtype for p in codes} == {torch.bfloat16}


def test_a_schedule_scales_both_rates():
    model, assignment = assigned()
    optimizer = build(model, assignment)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3, 1.5e-2]


def test_the_merged_model_is_plain():
    model, assignment = assigned(dtype=torch.float64)
    train(model, build(model, assignment))
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        reports = []
        plain = molf.merge(model, sample=IDS, report=reports.append)
        after = plain(input_ids=IDS).logits
    assert type(plain).__name__ == "Qwen2ForCausalLM"
    assert reports[0].layers == len(assignment.lora)
    torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)


def test_conv1d_is_full_or_lora():
    patterns = {"full": ["c_attn"], "lora": {"r": 4, "modules": ["c_fc", "mlp.c_proj"]}}
    model, assignment = assigned({**patterns, "default": "frozen"}, "gpt2", torch.float64)
    train(model, build(model, assignment))
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        plain = molf.merge(model)
        torch.testing.assert_close(plain(input_ids=IDS).logits, before, rtol=1e-9, atol=1e-9)


def test_a_head_may_be_a_layer_of_its_own():
    for train_as in ({"full": ["lm_head"]}, {"lora": {"r": 2, "modules": ["lm_head"]}}):
        model, assignment = assigned(
            {**train_as, "default": "frozen", "freeze_rest": True}, "llama"
        )
        optimizer = build(model, assignment)
        train(model, optimizer)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lm_head" in name for name in names)


def test_names_that_end_alike_are_adapted_one_by_one():
    """PEFT matches endings: `up` alone would also name `inner.up`."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.inner = nn.Linear(4, 4), nn.ModuleDict({"up": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["up"](self.up(x))

    model = Inner()
    base = Assignment.from_patterns(model, {"default": {"r": 2, "alpha": 2}})
    lines = base.to_yaml().replace("inner.up: {train: lora", "inner.up: {train: full")
    ranks = lines.replace("  up: {train: lora", "  up: {train: lora, r: 3, alpha: 6")
    assignment = Assignment.from_yaml(ranks, model)
    assert [layer.train for layer in assignment.entries] == ["lora", "full"]
    adapted = molf.with_assignment(model, assignment)
    tuners = {n: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert tuners == {"base_model.model.up": 3}


def test_layers_that_cannot_be_trained_so():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assignment = Assignment.from_patterns(encoder, {"default": {"r": 2}})
    with pytest.raises(ValueError, match=r"self_attn.in_proj cannot be lora: the model uses its"):
        molf.with_assignment(encoder, assignment)
    full = Assignment.from_patterns(
        encoder,
        {"full": ["in_proj"], "lora": {"r": 2, "modules": ["linear1"]}, "default": "frozen"},
    )
    assert molf.with_assignment(encoder, full).self_attn.in_proj_weight.requires_grad

    tied = tiny_model()
    tied.lm_head.weight = tied.embed.weight
    given = {"lora": {"r": 2, "modules": ["lm_head"]}, "default": "frozen"}
    with pytest.raises(ValueError, match=r"lm_head shares its weight with embed: merging"):
        molf.with_assignment(tied, Assignment.from_patterns(tied, given))
    twice = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    twice["b"].weight = twice["a"].weight
    for given, ok in (({"full": ["a"], "frozen": ["b"]}, False), ({"full": ["a", "b"]}, True)):
        assignment = Assignment.from_patterns(twice, {**given, "default": {"r": 2}})
        if ok:
            assert molf.with_assignment(twice, assignment).get_submodule("b").weight.requires_grad
        else:
            with pytest.raises(ValueError, match="b shares its weight with a: one cannot be"):
                molf.with_assignment(twice, assignment)


def test_a_refusal_leaves_the_model_as_it_was():
    model = make_model("qwen2")
    other = Assignment.from_patterns(make_model("qwen2", num_hidden_layers=1), {"default": "full"})
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="another model"):
        molf.with_assignment(model, other)
    nothing = Assignment.from_patterns(model, {"default": "frozen", "freeze_rest": True})
    with pytest.raises(ValueError, match="Nothing would be trained"):
        molf.with_assignment(model, nothing)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    adapted, assignment = assigned()
    with pytest.raises(ValueError, match="has an adapter already"):
        molf.with_assignment(adapted, assignment)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "base_layer", 3])
@pytest.mark.parametrize("add", [molf.with_assignment, molf.with_adapter])
def test_names_of_adapters_that_torch_or_peft_cannot_use(name, add):
    """Factors named `base_layer` would be taken for base weights, and would not be trained."""
    model = make_model("qwen2")
    before = {own: type(module) for own, module in model.named_modules()}
    given = molf.MoLFConfig(ranks=2)
    if add is molf.with_assignment:
        given = Assignment.from_patterns(model, {**PATTERNS, "frozen": ["0.mlp", "embed_tokens"]})
    with pytest.raises(ValueError, match=f"Invalid adapter_name={name!r}"):
        add(model, given, adapter_name=name)
    assert {own: type(module) for own, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [1, -0.1, float("nan"), "0.1", None])
def test_dropout_out_of_range(dropout):
    with pytest.raises(ValueError, match=r"Invalid lora_dropout=.*Must be in \[0, 1\)"):
        assigned(lora_dropout=dropout)


def test_a_head_is_not_full_and_frozen_by_its_parameter():
    """Its weight has a name in the rest too, by which a pattern of frozen may name it."""
    model = make_model("llama")
    given = {"full": ["lm_head", "k_proj"], "frozen": ["lm_head.weight"], "default": "frozen"}
    both = Assignment.from_patterns(model, given)
    for assignment in (both, Assignment.from_yaml(both.to_yaml(), model)):
        with pytest.raises(ValueError, match="lm_head is full, and its weight is frozen by its"):
            molf.with_assignment(model, assignment)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_weight_of_a_routed_head_is_no_frozen_rest():
    """An assignment by shape may make it full."""
    model = make_model("llama")
    modules = {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ()}
    config = molf.MoLFConfig(ranks=(2, 4), freeze_base=True, freeze_rest=False, **modules)
    adapted = molf.with_adapter(model, config)
    optimizer = molf.MoLFAdamW.from_model(adapted, config, lr=1e-3)
    train(adapted, optimizer, 2)
    decided = Assignment.of(optimizer)
    assert decided["lm_head"].train == "lora"
    assert not decided.freeze_rest
    assert decided.frozen_rest == ()
    shaped = decided.by_shape(molf.MoLFConfig(ranks=2), lr=1.0, lora_lr=1e-3)
    plain = molf.with_assignment(make_model("llama"), shaped)
    assert plain.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"full": ["layers"]}, r"are full: this is full fine-tuning \(method fft\)"),
        ({"full": ["layers"], "freeze_rest": True}, "full fine-tuning with the rest frozen"),
        ({"default": LORA, "freeze_rest": True}, r"are lora: this is LoRA \(method lora\)"),
        ({"default": LORA}, "are lora: this is LoRA with the rest trained"),
        ({"default": "frozen"}, "are frozen: only norms"),
    ],
)
def test_one_kind_is_another_method(patterns, message):
    model = make_model("qwen2")
    with pytest.warns(UserWarning, match=message):
        molf.with_assignment(model, Assignment.from_patterns(model, patterns))


def test_the_optimizer_needs_the_prepared_model():
    model = make_model("qwen2")
    assignment = Assignment.from_patterns(model, PATTERNS)
    with pytest.raises(ValueError, match=r"q_proj is lora and has no adapter. Call molf.with_ass"):
        molf.AdamW.from_assignment(model, assignment, lr=1e-3)
    frozen = Assignment.from_patterns(model, {"full": ["mlp"], "default": "frozen"})
    with pytest.raises(ValueError, match=r"q_proj is frozen and its weight is trainable"):
        molf.AdamW.from_assignment(model, frozen, lr=1e-3)
    adapted, _ = assigned()
    other = Assignment.from_yaml(assignment.to_yaml().replace("r: 6", "r: 5"))
    with pytest.raises(ValueError, match=r"is lora with r=5, and its adapter has rank 6"):
        molf.AdamW.from_assignment(adapted, other, lr=1e-3)
    other = Assignment.from_yaml(assignment.to_yaml().replace("alpha: 5.0", "alpha: 7.0"))
    with pytest.raises(ValueError, match=r"is lora with alpha=7, and its adapter has alpha 5"):
        molf.AdamW.from_assignment(adapted, other, lr=1e-3)
    for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay"):
        with pytest.raises(ValueError, match=f"Invalid {name}=-1"):
            build(adapted, assignment, **{name: -1})


def test_patterns_and_paths_are_no_assignment():
    model = make_model("qwen2")
    for wrong, kind in ((PATTERNS, "dict"), ("assignment.yaml", "str")):
        message = (
            rf"Invalid assignment of type {kind}\. Must be a molf\.Assignment: .*from_patterns"
        )
        with pytest.raises(TypeError, match=message):
            molf.with_assignment(model, wrong)
        with pytest.raises(TypeError, match=message):
            molf.AdamW.from_assignment(model, wrong, lr=1e-3)
        with pytest.raises(TypeError, match=rf"Invalid config of type {kind}\. Must be a molf"):
            molf.trainer_optimizer(wrong, lr=1e-3)


def test_quantised_where_lora_and_bfloat16_where_full(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model("qwen2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["k_proj", "v_proj", "lm_head"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.bfloat16
    )
    wrong = Assignment.from_patterns(model, {"full": ["q_proj"], "default": "frozen"})
    with pytest.raises(ValueError, match="q_proj is quantised and cannot be full"):
        molf.with_assignment(model, wrong)
    assignment = Assignment.from_patterns(model, PATTERNS)
    with pytest.raises(ValueError, match="use_dora=True: its magnitudes"):
        molf.with_assignment(model, assignment, use_dora=True)
    model = molf.with_assignment(model, assignment)
    kinds = {plain_name(name): type(p).__name__ for name, p in model.named_parameters()}
    assert {kinds[f"{x.name}.weight"] for x in assignment.full} == {"Parameter"}
    assert {kinds[f"{x.name}.weight"] for x in assignment.lora} == {"Params4bit"}
    optimizer = build(model, assignment)
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if n.endswith("q_proj.base_layer.bias")
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    train(model, optimizer, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    optimizer.restore_float32()
    reports = []
    plain = molf.merge(model, base="dequantised", sample=IDS, report=reports.append)
    assert {type(p).__name__ for p in plain.parameters()} == {"Parameter"}
    assert len(reports) == 1


def test_a_wrapped_model_is_the_same():
    model, assignment = assigned()
    compiled = torch.compile(model)
    optimizer = build(compiled, assignment)
    assert len(optimizer.param_groups) == 3


def test_a_model_may_be_wrapped_before_it_is_assigned(tmp_path):
    model = torch.compile(make_model("qwen2"), backend="eager")
    assignment = Assignment.from_patterns(model, PATTERNS)
    model = molf.with_assignment(model, assignment)
    build(model, assignment)  # checks ranks and alphas
    tuners = {
        name.removeprefix("base_model.model._orig_mod."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    expected = {x.name: (x.r, x.alpha, x.alpha / x.r) for x in assignment.lora}
    assert expected == {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in tuners.items()
    }
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model("qwen2"), tmp_path)
    assert expected == {
        plain_name(name): (one.r["default"], one.lora_alpha["default"], one.scaling["default"])
        for name, one in loaded.named_modules()
        if hasattr(one, "lora_A")
    }


def test_conv1d_of_any_model():
    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 3))
    assignment = Assignment.from_patterns(model, {"full": ["0"], "lora": {"r": 2, "modules": "1"}})
    assert assignment["0"].shape == (6, 4)
    model = molf.with_assignment(model, assignment)
    optimizer = build(model, assignment)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
