"""Check that `LimitTokens` makes of a Trainer's tokens what the rule makes of their losses, and nothing else.

Oracles: the loss that the model itself computes, losses by plain loops in float64 fed to `alrc_trace`, a step by hand.
Twins: one that learns from padding, one that forgets `num_items_in_batch`, one that limits in evaluation, and a
checkpoint without moments must all be seen.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alrc.reference import alrc_trace
from alrc.torch import ALRC
from bitwise import same

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

import transformers

from alrc.integrations.transformers import LimitTokens

REPOSITORY = Path(__file__).parents[2]
LONGEST = 16
START = {"start": (5.5, 30.5), "betas": (0.9, 0.9), "num_stddev": 1.5}
"""Mean 5.5, standard deviation 0.5: some of an untrained network's tokens are above the limit."""
Text = dict[str, list[int]]


def sentences(number: int, seed: int = 0) -> list[Text]:
    """Cut the topics of Python's own help into pieces of different lengths; the tokens are bytes."""
    corpus = "".join(topics.values()).encode("ascii", "replace")
    lengths = np.random.default_rng(seed).integers(4, LONGEST + 1, number)
    ends = np.cumsum(lengths)
    return [{"input_ids": list(corpus[end - n : end])} for n, end in zip(lengths, ends, strict=True)]


def padded(texts: list[Text]) -> dict[str, Tensor]:
    """Make a batch, with padding on the right that is no label."""
    rows = [text["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    known = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": known, "labels": ids.masked_fill(known == 0, -100)}


def causal(*_: Any) -> Any:
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=128, initializer_range=0.2, **shape, **ids)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(1)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LONGEST, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, **shape)).eval()


def bert(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=128, num_labels=128, max_position_embeddings=LONGEST, **shape)
        return getattr(transformers, kind)(config).eval()

    return make


def train(
    folder: Path, limit_tokens: Any, model: Any = None, resume: Any = None, seen: Any = None, **others: Any
) -> tuple[Any, Any]:
    """Train a tiny language model for a few steps and return it with its Trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **others,
    }
    parts: dict[str, Any] = {} if callable(model) and not isinstance(model, nn.Module) else {"model": model or causal()}
    if not parts:
        parts = {"model_init": model}
    if limit_tokens is not None:
        parts |= {"compute_loss_func": seen or limit_tokens, "callbacks": [limit_tokens]}
    texts = sentences(48)
    arguments = transformers.TrainingArguments(**settings)
    trainer = transformers.Trainer(
        args=arguments, train_dataset=texts, eval_dataset=texts[:5], data_collator=padded, **parts
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model, trainer


# ------------------------------------------------------------------------------------------------------- one loss


def check_model(make: Callable[[], Any], limit_tokens: LimitTokens, number: int | None = None) -> None:
    """Compare value and gradients with what the model makes of the same labels itself."""
    batch = padded(sentences(5))
    models = [make(), make()]
    kwargs = {} if number is None else {"num_items_in_batch": number}
    wanted = models[0](**batch, **kwargs).loss
    labels = batch.pop("labels")
    loss = limit_tokens(models[1](**batch), labels, **kwargs)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for one, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


def knowing(model: Any, **settings: Any) -> LimitTokens:
    """Make a `LimitTokens` that a Trainer of this model has introduced itself to."""
    limit_tokens = LimitTokens(**settings)
    limit_tokens.on_init_end(transformers.TrainingArguments(report_to=[], use_cpu=True), None, None, model=model)
    return limit_tokens


@pytest.mark.filterwarnings("ignore:`loss_type=None`")
@pytest.mark.parametrize("number", [None, 100])
@pytest.mark.parametrize("make", [causal, gpt2], ids=["llama", "gpt2"])
def test_a_causal_model_has_the_loss_it_would_compute(make: Callable[[], Any], number: int | None) -> None:
    check_model(make, knowing(make()), number)
    check_model(make, LimitTokens(shift=True), number)
    with pytest.raises(AssertionError):
        check_model(make, LimitTokens(shift=False), number)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_model_of_positions_has_the_loss_it_would_compute(kind: str) -> None:
    check_model(bert(kind), knowing(bert(kind)()))
    with pytest.raises(AssertionError):
        check_model(bert(kind), LimitTokens(shift=True))


def test_an_encoder_decoder_does_not_shift() -> None:
    config = transformers.T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    make = lambda: torch.manual_seed(1) and transformers.T5ForConditionalGeneration(config).eval()  # noqa: E731
    batch = padded(sentences(3))
    model = make()
    outputs = model(**batch)
    torch.testing.assert_close(knowing(model)(outputs, batch["labels"]), outputs.loss)


def losses_by_hand(logits: Tensor, labels: Tensor, shift: bool) -> list[tuple[int, int, float]]:
    """Return row, position and loss of every token that has a label, by loops in float64."""
    found = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - shift):
            label = int(labels[row, place + shift])
            if label != -100:
                scores = logits[row, place].double().tolist()
                top = max(scores)
                found.append(
                    (row, place, top + math.log(sum(math.exp(score - top) for score in scores)) - scores[label])
                )
    return found


def check_tokens(make: Callable[..., LimitTokens], shift: bool, dtype: torch.dtype = torch.float32) -> None:
    """Compare values, gradients and moments of several batches, an infinite loss among them, with the oracle."""
    settings: dict[str, Any] = {**START, "observe": 32}
    limit_tokens = make(ALRC(**settings), shift=shift)
    generator = torch.Generator().manual_seed(3)
    stream, did, wanted = [], [], []
    for step in range(6):
        width = 5 + step % 3
        logits = (3 * torch.randn(3, width, 7, generator=generator) + 1).to(dtype)
        logits[0, 0] += 9 * F.one_hot(torch.tensor(step % 7), 7).to(dtype) if step == 4 else 0
        labels = torch.randint(0, 7, (3, width), generator=generator)
        if step == 3:
            logits[1, 1, labels[1, 1 + shift]] = -torch.inf
        labels[1, -2:], labels[2, 1:] = -100, -100
        found = losses_by_hand(logits, labels, shift)
        stream.append([loss for _, _, loss in found])
        trace = alrc_trace(stream, **settings)
        logits.requires_grad_()
        loss = limit_tokens({"logits": logits}, labels, num_items_in_batch=torch.tensor(11))
        loss.backward()
        assert logits.grad is not None
        did.append((loss.item(), logits.grad.double(), float(limit_tokens.limit.mu1), float(limit_tokens.limit.mu2)))
        gradient = torch.zeros(3, width, 7, dtype=torch.float64)
        for (row, place, _), scale in zip(found, trace.scale[-1], strict=True):
            if scale:
                label = labels[row, place + shift]
                chances = logits.detach()[row, place].double().softmax(0)
                gradient[row, place] = float(scale) / 11 * (chances - F.one_hot(label, 7))
        wanted.append((trace.limited[-1].sum() / 11, gradient, trace.mu1[-1], trace.mu2[-1]))
    assert sum(int((scale == 0).sum()) for scale in trace.scale) == 1, "there is no infinite loss"
    assert sum(int(((scale < 1) & (scale > 0)).sum()) for scale in trace.scale) > 5, "the tokens are not limited"
    for one, other in zip(did, wanted, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-7 if dtype.itemsize > 2 else 1e-2)
        np.testing.assert_allclose([one[0], *one[2:]], [other[0], *other[2:]], rtol=1e-6)


class MaskIgnored(ALRC):
    """Take padding for tokens that are certain."""

    def forward(self, losses: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return super().forward(losses)


def learning_from_padding(limit: ALRC, **settings: Any) -> LimitTokens:
    return LimitTokens(MaskIgnored.from_rule(limit.rule), **settings)


class ItemsIgnored(LimitTokens):
    """Average over a micro-batch, whatever the others hold."""

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return super().__call__(outputs, labels)


@pytest.mark.parametrize("shift", [True, False])
def test_tokens_are_limited_as_the_oracle_does(shift: bool) -> None:
    check_tokens(LimitTokens, shift)
    check_tokens(LimitTokens, shift, torch.float64)
    check_tokens(LimitTokens, shift, torch.bfloat16)


@pytest.mark.parametrize("make", [learning_from_padding, ItemsIgnored])
def test_a_wrong_one_is_seen_in_its_tokens(make: Callable[..., LimitTokens]) -> None:
    with pytest.raises(AssertionError):
        check_tokens(make, True)


def test_a_number_for_each_replica_is_what_data_parallelism_needs() -> None:
    """The Trainer repeats the number for n replicas, and multiplies the loss by n."""
    batch = padded(sentences(4))
    outputs = causal()(input_ids=batch["input_ids"])
    wanted = LimitTokens(shift=True)(outputs, batch["labels"], 50)
    got = LimitTokens(shift=True)(outputs, batch["labels"], torch.tensor(50).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(2 * got, wanted)


def test_no_token_is_no_loss() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    for number in (None, torch.tensor(0)):
        limit_tokens = LimitTokens(shift=True)
        loss = limit_tokens((logits,), torch.full((2, 3), -100), num_items_in_batch=number)
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert not logits.grad.any()
        assert limit_tokens.limit.count == 0


def test_a_certain_token_is_no_reason_to_warn() -> None:
    logits = (1000 * F.one_hot(torch.arange(4), 4).float()).requires_grad_()
    assert LimitTokens(shift=False)((logits,), torch.arange(4)) == 0


def test_a_loss_function_of_ones_own() -> None:
    outputs, targets = torch.rand(5, 1, requires_grad=True), torch.rand(5)
    limit_tokens = LimitTokens(shift=False, loss_function=lambda logits, labels: (logits[:, 0] - labels).square())
    torch.testing.assert_close(limit_tokens((outputs,), targets), F.mse_loss(outputs[:, 0], targets))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        LimitTokens(shift=False)((outputs,), targets)
    with pytest.raises(ValueError, match=r"shape \(5,\), got shape \(\)"):
        LimitTokens(shift=False, loss_function=lambda logits, labels: logits.sum())((outputs,), targets)


def test_what_is_not_known_is_asked_for() -> None:
    outputs, labels = (torch.rand(2, 3, 4),), torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="pass shift=True or shift=False"):
        LimitTokens()(outputs, labels)
    with pytest.raises(TypeError, match="limit must be an ALRC, got float"):
        LimitTokens(3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no labels"):
        LimitTokens(shift=True)(outputs, None)
    with pytest.raises(ValueError, match="pass shift=True or shift=False"):
        knowing(nn.Linear(1, 1))(outputs, labels)


# ------------------------------------------------------------------------------------------------------- a Trainer


def check_accumulation(folder: Path, make: Callable[..., LimitTokens]) -> None:
    """Compare four micro-batches of one text each, of different lengths, with one batch of four."""
    limits, weights, shares = [], [], []
    for name, size, k in (("one", 4, 1), ("four", 1, 4)):
        limit_tokens = make(ALRC(**START))
        model, trainer = train(
            folder / name, limit_tokens, per_device_train_batch_size=size, gradient_accumulation_steps=k
        )
        limits.append(limit_tokens.limit.state_dict())
        weights.append(model.state_dict())
        shares.append([log["alrc/fraction_limited"] for log in trainer.state.log_history if "loss" in log])
        assert limit_tokens.limit.count == 6
    torch.testing.assert_close(shares[1], shares[0])
    assert min(shares[0]) > 0.01, "the tokens limit nothing"
    torch.testing.assert_close(limits[1], limits[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    check_accumulation(tmp_path, LimitTokens)


@pytest.mark.parametrize("make", [learning_from_padding, ItemsIgnored])
def test_a_wrong_one_is_seen_in_its_micro_batches(tmp_path: Path, make: Callable[..., LimitTokens]) -> None:
    with pytest.raises(AssertionError, match="are not close"):
        check_accumulation(tmp_path, make)


def test_a_training_that_limits_nothing_is_that_of_the_model(tmp_path: Path) -> None:
    others = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    model, trainer = train(tmp_path, LimitTokens(), **others)
    wanted, other = train(tmp_path, None, **others)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=1e-5, atol=1e-6)
    for one, two in zip(trainer.state.log_history[:-1], other.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["alrc/fraction_limited"] == one["alrc/nonfinite"] == 0
        assert "alrc/limit" not in one, "there is no limit yet"


def test_a_trainer_gives_the_moments_of_the_oracle(tmp_path: Path) -> None:
    stream: list[list[float]] = []
    limit_tokens = LimitTokens(ALRC(**START))

    def seen(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        stream.append([loss for _, _, loss in losses_by_hand(outputs.logits.detach(), labels, True)])
        return limit_tokens(outputs, labels, num_items_in_batch)

    _, trainer = train(tmp_path, limit_tokens, seen=seen, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    steps = [one + two for one, two in zip(stream[::2], stream[1::2], strict=True)]
    trace = alrc_trace(steps, **START)
    limit = limit_tokens.limit
    np.testing.assert_allclose([float(limit.mu1), float(limit.mu2)], [trace.mu1[-1], trace.mu2[-1]], rtol=1e-6)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6]
    for log, end in zip(logs, (2, 4, 6), strict=True):
        scales = np.concatenate(trace.scale[end - 2 : end])
        assert log["alrc/fraction_limited"] == pytest.approx(np.mean(scales < 1))
        assert log["alrc/nonfinite"] == 0
        losses = [float(np.sum(limited) / len(limited)) for limited in trace.limited[end - 2 : end]]
        assert log["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert logs[0]["alrc/limit"] == pytest.approx(trace.limit[2], rel=1e-5)


def test_a_step_with_limited_tokens_is_that_by_hand(tmp_path: Path) -> None:
    limit_tokens = LimitTokens(ALRC(**START))
    batches: list[Any] = []

    def seen(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        batches.append(labels)
        return limit_tokens(outputs, labels, num_items_in_batch)

    model, _ = train(tmp_path, limit_tokens, seen=seen, max_steps=1)
    labels = batches[0]
    by_hand, known = causal(), labels != -100
    logits = by_hand(input_ids=labels.clamp(min=0), attention_mask=known.long()).logits[:, :-1]
    chances = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1))[..., 0]
    losses = -chances[known[:, 1:]]
    ceiling = 5.5 + 1.5 * math.sqrt(30.5 - 5.5**2)
    factors = (ceiling / losses.detach()).clamp(max=1)
    assert 0 < (factors < 1).sum() < len(factors)
    ((factors * losses).sum() / len(losses)).backward()
    for got, parameter in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, parameter - 0.5 * parameter.grad, rtol=1e-5, atol=1e-6)


class AlwaysLimiting(LimitTokens):
    """Look at nothing but the losses."""

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        with torch.enable_grad():
            outputs = {"logits": outputs["logits"] + torch.zeros((), requires_grad=True)}
            return super().__call__(outputs, labels, num_items_in_batch)


def check_evaluation(folder: Path, make: Callable[..., LimitTokens]) -> None:
    """Compare with a training that does not evaluate, and with what the model says of the same texts."""
    runs = []
    for name, others in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True})):
        limit_tokens = make(ALRC(**START))
        model, trainer = train(folder / name, limit_tokens, **others, per_device_eval_batch_size=8)
        runs.append((limit_tokens.limit.state_dict(), model.state_dict()))
        logs = [log["alrc/fraction_limited"] for log in trainer.state.log_history if "loss" in log]
        runs[-1] += (logs,)
    assert same(runs[0], runs[1])
    before = copy.deepcopy(limit_tokens.limit.state_dict())
    got = trainer.evaluate()
    assert "alrc/limit" not in got
    assert same(limit_tokens.limit.state_dict(), before)
    batch = padded(sentences(48)[:5])
    labels = batch.pop("labels")
    with torch.no_grad():
        found = losses_by_hand(model(**batch).logits, labels, True)
    losses = np.array([loss for _, _, loss in found])
    assert (losses > float(limit_tokens.limit.limit)).any(), "no token would be limited"
    assert got["eval_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_evaluation_neither_limits_nor_learns(tmp_path: Path) -> None:
    check_evaluation(tmp_path, LimitTokens)


def test_one_that_limits_in_evaluation_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_evaluation(tmp_path, AlwaysLimiting)


def test_label_smoothing_is_the_trainers(tmp_path: Path) -> None:
    model, _ = train(tmp_path, LimitTokens(), label_smoothing_factor=0.2)
    wanted, _ = train(tmp_path, None, label_smoothing_factor=0.2)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.2 means nothing"):
        train(tmp_path, LimitTokens(loss_function=F.cross_entropy), label_smoothing_factor=0.2)


def test_a_callback_that_is_no_loss_function_says_so(tmp_path: Path) -> None:
    limit_tokens = LimitTokens()
    with pytest.raises(RuntimeError, match="compute_loss_func=limit_tokens"):
        train(tmp_path, limit_tokens, seen=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


def test_attaching_reaches_the_reporters_before(tmp_path: Path) -> None:
    told: list[Any] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            told.append(dict(logs))

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, logging_steps=1
    )
    trainer = transformers.Trainer(
        causal(), arguments, data_collator=padded, train_dataset=sentences(16), callbacks=[Reporter()]
    )
    limit_tokens = LimitTokens(ALRC(**START)).attach(trainer)
    assert limit_tokens.attach(trainer) is limit_tokens
    trainer.train()
    assert [name in told[0] for name in ("loss", "alrc/limit", "alrc/fraction_limited", "alrc/nonfinite")] == [True] * 4
    assert limit_tokens.limit.count == 2


# ------------------------------------------------------------------------------------------------------ checkpoints


def check_resuming(folder: Path, forget: bool = False, **others: Any) -> None:
    """Compare a run with one that is cut at step 4 of 8 and goes on in new objects."""
    others |= {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    rule = {"observe": 4, "num_stddev": 1.0}
    one = LimitTokens(ALRC(**rule))
    model, trainer = train(folder, one, **others)
    checkpoint = folder / "checkpoint-4"
    if forget:
        path = checkpoint / "trainer_state.json"
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["alrc"]
        path.write_text(json.dumps(state))
    two = LimitTokens(ALRC(**rule))
    wanted, other = train(folder, two, resume=str(checkpoint), **others)
    logs = [[log for log in run.state.log_history if "loss" in log] for run in (trainer, other)]
    assert any(log["alrc/fraction_limited"] > 0 for log in logs[0][4:]), "the tokens are not limited"
    assert same(two.limit.state_dict(), one.limit.state_dict())
    assert same(wanted.state_dict(), model.state_dict())
    assert logs[1] == logs[0]


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resuming(tmp_path, gradient_accumulation_steps=2, optim="adamw_torch", learning_rate=0.01)


def test_a_checkpoint_resumes_beside_callbacks_that_the_trainer_restores(tmp_path: Path) -> None:
    check_resuming(tmp_path, restore_callback_states_from_checkpoint=True)


def test_moments_that_were_not_stored_are_missed_but_no_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_resuming(tmp_path, forget=True)
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["alrc"]["count"] == 4


def test_moments_of_another_rule_are_refused(tmp_path: Path) -> None:
    train(tmp_path, LimitTokens(), save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="has version 2, but this ALRC reads version 1"):
        train(tmp_path, LimitTokens(ALRC(**START)), resume=True, max_steps=8)


def test_a_new_model_starts_from_new_moments(tmp_path: Path) -> None:
    limit_tokens = LimitTokens(ALRC(observe=4))
    _, trainer = train(tmp_path, limit_tokens, model=causal)
    first = copy.deepcopy(limit_tokens.limit.state_dict())
    trainer.train()
    assert same(limit_tokens.limit.state_dict(), first)


def test_the_same_model_keeps_its_moments(tmp_path: Path) -> None:
    limit_tokens = LimitTokens(ALRC(observe=4))
    _, trainer = train(tmp_path, limit_tokens)
    trainer.train()
    assert limit_tokens.limit.count == 12
    twin = pickle.loads(pickle.dumps(limit_tokens))
    assert same(twin.limit.state_dict(), limit_tokens.limit.state_dict())


@pytest.mark.slow
def test_importing_loads_no_model_and_no_trainer() -> None:
    code = "import sys, alrc.integrations.transformers; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "transformers.trainer_callback" in told
    assert not {"transformers.trainer", "transformers.modeling_utils"} & set(told)


def test_the_example_limits_what_is_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    runpy.run_path(str(REPOSITORY / "examples" / "transformers_tokens.py"))["main"]()
    transformers.utils.logging.set_verbosity(verbosity)
    said = capsys.readouterr().out
    plain, limited = map(float, re.findall(r"([\d.]+) without limiting, ([\d.]+) with", said)[0])
    damaged, others = map(float, re.findall(r"([\d.]+)% in damaged steps, ([\d.]+)% in others", said)[0])
    assert damaged > 10
    assert others < 3
    assert limited < plain + 0.05 < 2.8
