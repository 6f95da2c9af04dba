"""Retrieval and long generation: cases, the shared prefill, scores, resuming, the command line."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, QuantizedCache, cache_utils

from skvq import QuantizedDynamicCache, SkvqConfig, StreamOptions
from skvq.evaluate import long_generation, retrieval, shared_prefill, tasks_cli
from skvq.evaluate.cache_spec import CacheDefaults, parse_cache, parse_caches, parse_options
from skvq.evaluate.long_generation import LongGenerationOptions, run_long_generation
from skvq.evaluate.retrieval import RetrievalOptions, run_retrieval
from skvq.evaluate.retrieval_cases import TASKS, CaseMaker, Haystack, PromptFormat
from skvq.evaluate.task_records import RecordFile
from skvq.evaluate.task_statistics import mean_and_error, wilson_interval
from skvq.evaluate.texts import Text, digests, packaged_texts, read_text
from skvq.model_layers import cache_argument
from skvq.plan import StreamPlan
from skvq.plan_file import QuantizationPlan
from tiny_directory import save
from tiny_models import build, prompts

TEMPLATE = (
    "{% for message in messages %}({{ message['role'] }}){{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
SMALL = {"window": 8, "sinks": 2, "keys": {"block": 0}, "values": {"block": 0}}
PROSE = " ".join(f"Sentence number {word} tells of nothing." for word in ("one", "two", "three", "four", "five") * 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def maker(tokenizer: Any, **options: Any) -> CaseMaker:
    form = PromptFormat(tokenizer)
    return CaseMaker(form, Haystack.from_text(PROSE, lambda texts: list(map(len, texts))), **options)


def caches(model: Any) -> dict[str, Any]:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "exact": lambda: QuantizedDynamicCache(model.config, key_bits=16, value_bits=16, window=8, sinks=2),
        "packed": lambda: QuantizedDynamicCache(model.config, key_bits=2, value_bits=1.6, **SMALL),
    }


# ---- the shared prefill ----------------------------------------------------------------------------------------------


def test_a_shared_prefill_shows_the_queries_too() -> None:
    model, ids = build("qwen3", "sdpa"), prompts(1, 300)
    filled = shared_prefill.read_context(model, ids).fill(QuantizedDynamicCache(model.config, window=16))
    own = QuantizedDynamicCache(model.config, window=16)
    model(ids, **cache_argument(model, own))
    for one, other in zip(filled.layers, own.layers, strict=True):
        found, wanted = (torch.from_dlpack(layer.native.query_factors(0, 1)) for layer in (one, other))
        assert torch.equal(found, wanted)
        assert wanted.std() > 0.01


def test_a_shared_prefill_is_fitted_to_as_an_own_one() -> None:
    model, ids = build("qwen3", "sdpa"), prompts(1, 300)
    own, given = (QuantizedDynamicCache(model, window=16, fit_tokens=256) for _ in range(2))
    model(ids, **cache_argument(model, own))
    filled = shared_prefill.read_context(model, ids).fill(given)
    for one, other in zip(filled.layers, own.layers, strict=True):
        assert one.kind == other.kind == "K2 V1.6 fitted"
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "packed"])
def test_filling_is_what_the_own_prefill_does(family: str, kind: str) -> None:
    model, ids = build(family), prompts(1, 70)
    own, later = caches(model)[kind](), prompts(1, 5, seed=1)
    first = shared_prefill.continue_with(model, own, ids, keep=1)[0]
    context = shared_prefill.read_context(model, ids)
    torch.testing.assert_close(context.log_probabilities, first)
    filled = context.fill(caches(model)[kind]())
    assert filled.get_seq_length() == 70
    torch.testing.assert_close(
        shared_prefill.continue_with(model, filled, later), shared_prefill.continue_with(model, own, later)
    )


def test_a_cache_that_rounds_in_prefill_is_refused(model: Any) -> None:
    class Rounding(DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *rest: Any, **more: Any) -> Any:
            return tuple(x.bfloat16().float() for x in super().update(keys, values, layer, *rest, **more))

    context = shared_prefill.read_context(model, prompts(1, 20))
    with pytest.raises(ValueError, match="Rounding returns other keys of layer 0"):
        context.fill(Rounding(config=model.config))
    with pytest.raises(ValueError, match="holds 20 tokens, expected an empty one"):
        context.fill(context.fill(DynamicCache(config=model.config)))


@pytest.mark.parametrize("kind", ["dynamic", "packed"])
def test_a_copy_grows_on_its_own(model: Any, kind: str) -> None:
    context = shared_prefill.read_context(model, prompts(1, 40))
    filled = context.fill(caches(model)[kind]())
    twin = shared_prefill.copy_of(filled, model)
    shared_prefill.continue_with(model, twin, prompts(1, 30, seed=2))
    assert (filled.get_seq_length(), twin.get_seq_length()) == (40, 70)
    fresh = context.fill(caches(model)[kind]())
    later = prompts(1, 3, seed=3)
    assert torch.equal(
        shared_prefill.continue_with(model, filled, later), shared_prefill.continue_with(model, fresh, later)
    )


def test_bits_count_everything_a_cache_holds(model: Any) -> None:
    context = shared_prefill.read_context(model, prompts(1, 120))
    found = {name: context.bits(context.fill(make()), model.config) for name, make in caches(model).items()}
    assert found["dynamic"] == 32.0  # the model is float32
    packed = context.fill(caches(model)["packed"]())
    assert found["packed"] == packed.bits_per_element


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 1500])
def test_a_case_fits_its_length_and_holds_its_answers_once(tokenizer: Any, task: str, length: int) -> None:
    cases = maker(tokenizer, depths=3, hops=2)
    case = cases.make(task, length, 0)
    assert length - 160 < cases.tokens(case) <= length
    assert [question.depth for question in case.questions] == [0, 1, 2]
    for question in case.questions:
        assert case.context.count(question.answer) == 1
        place = case.context.index(question.answer) / len(case.context)
        if task != "variables":  # whose number is in the first link of the chain
            assert abs(place - (question.depth + 0.5) / 3) < 0.1
        assert question.depth / 3 - 0.05 < place < (question.depth + 1) / 3 + 0.05


def test_cases_are_seeded(tokenizer: Any) -> None:
    assert maker(tokenizer).make("needle", 1500, 0) == maker(tokenizer).make("needle", 1500, 0)
    others = [maker(tokenizer).make("needle", 1500, 1), maker(tokenizer, seed=1).make("needle", 1500, 0)]
    assert len({case.context for case in [maker(tokenizer).make("needle", 1500, 0), *others]}) == 3


def test_a_chain_of_variables_leads_to_its_number(tokenizer: Any) -> None:
    case = maker(tokenizer, depths=2, hops=3).make("variables", 1500, 0)
    values = {
        sentence.split()[1]: sentence.split(" = ")[1].rstrip(".")
        for sentence in case.context.replace(". ", ".|").split("|")
        if sentence.startswith("Let ")
    }
    assert len(values) == 6
    for question in case.questions:
        name, steps = question.text.split()[2], 0
        while name in values:
            name, steps = values[name], steps + 1
        assert (name, steps) == (question.answer, 3)


def test_too_short_lengths_and_texts_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="length is 100, too short for task 'needle' with 5 depths"):
        maker(tokenizer).make("needle", 100, 0)
    with pytest.raises(ValueError, match="give more with --texts"):
        maker(tokenizer).make("needle", 100000, 0)
    with pytest.raises(ValueError, match="task is 'haystack', expected one of needle"):
        maker(tokenizer).make("haystack", 1000, 0)


def test_prompts_follow_the_chat_template_where_there_is_one(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="no chat template"):
        PromptFormat(tokenizer, chat=True)

    def parts() -> list[str]:
        form = PromptFormat(tokenizer)
        ids = [form.context("Read.", "Text"), form.question("Where?", "It is")]
        return ["".join(tokenizer.convert_ids_to_tokens(x)) for x in ids]

    assert parts() == ["Read.\n\nText\n\n", "Question: Where?\nAnswer: It is"]
    tokenizer.chat_template = TEMPLATE
    assert parts() == ["(user)Read.\n\nText\n\n", "Where?\n(assistant) It is"]


# ---- retrieval -------------------------------------------------------------------------------------------------------

FEW = RetrievalOptions(tasks=("needle", "lines"), lengths=(700,), depths=2, cases=1)


@pytest.mark.parametrize("prefill", ["chunk", "whole"])
def test_retrieval_reads_what_a_cache_stored(model: Any, tokenizer: Any, prefill: str) -> None:
    options = RetrievalOptions(tasks=("needle",), lengths=(700,), depths=2, cases=1, prefill=prefill)
    seen: list[int] = []
    records = run_retrieval(model, tokenizer, caches(model), options, PROSE, report=lambda count, _: seen.append(count))
    assert len(records) == sum(seen) == 2 * 3
    found = {(record["cache"], record["depth"]): record for record in records}
    for depth in range(2):
        exact, dynamic, packed = (found[name, depth] for name in ("exact", "dynamic", "packed"))
        assert exact["answer"] == dynamic["answer"]
        assert exact["nll"] == pytest.approx(dynamic["nll"], abs=1e-4)
        assert abs(packed["nll"] - dynamic["nll"]) > 1e-3
        assert packed["bits"] < 8 < dynamic["bits"]


def test_one_call_or_two_are_the_same_in_full_precision(model: Any, tokenizer: Any) -> None:
    only = {"dynamic": caches(model)["dynamic"]}
    nll = []
    for prefill in ("chunk", "whole"):
        options = RetrievalOptions(tasks=("lines",), lengths=(700,), depths=2, cases=1, prefill=prefill)
        nll.append([record["nll"] for record in run_retrieval(model, tokenizer, only, options, PROSE)])
    assert nll[0] == pytest.approx(nll[1], abs=1e-4)


def test_retrieval_goes_on_where_it_was(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path, both = tmp_path / "records.jsonl", caches(model)
    run = lambda names, which=model: run_retrieval(  # noqa: E731
        which, tokenizer, {name: both[name] for name in names}, FEW, PROSE, RecordFile(path, {}, retrieval.KEY)
    )
    first = run(["dynamic"])
    assert len(first) == 4
    extended = run(["dynamic", "packed"])
    assert [x for x in extended if x["cache"] == "dynamic"] == first
    assert len(path.read_text().splitlines()) == 1 + 8

    class NoModel:
        """Fails when it is used."""

        generation_config = None

    assert run(["dynamic", "packed"], NoModel()) == extended


def test_the_first_number_of_an_answer_counts() -> None:
    assert retrieval.is_right(" 12345.", "12345")
    assert retrieval.is_right("is 12345, not 99999", "12345")
    assert not retrieval.is_right("99999, not 12345", "12345")
    assert not retrieval.is_right(" 123456", "12345")
    assert not retrieval.is_right(" 1234", "12345")
    assert not retrieval.is_right("", "12345")


def test_summary_counts_cells_and_intervals() -> None:
    def record(cache: str, depth: int, case: int, right: bool) -> dict[str, Any]:
        place = {"task": "needle", "length": 1024, "case": case, "depth": depth, "cache": cache}
        return {**place, "right": right, "nll": 0.0 if right else 2.0, "bits": 16.0}

    records = [record("dynamic", depth, case, True) for depth in range(2) for case in range(2)]
    records += [record("packed", 0, 0, True), record("packed", 0, 1, True)]
    records += [record("packed", 1, 0, True), record("packed", 1, 1, False)]
    first, second = retrieval.summary(records)
    assert (first["accuracy"], first["cells_below_first"]) == (1.0, 0)
    assert (second["accuracy"], second["cells_below_first"], second["cells_above_first"]) == (0.75, 1, 0)
    assert second["nll"] == 0.5
    assert (second["accuracy_low"], second["accuracy_high"]) == wilson_interval(3, 4)
    cells = {(cell["cache"], cell["depth"]): cell["accuracy"] for cell in retrieval.grid(records)}
    assert cells == {("dynamic", 0): 1.0, ("dynamic", 1): 1.0, ("packed", 0): 1.0, ("packed", 1): 0.5}


def test_statistics() -> None:
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(1.9599640**2 / (10 + 1.9599640**2))
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert mean_and_error([5.0]) == (5.0, 0.0)
    with pytest.raises(ValueError, match="empty"):
        mean_and_error([])


# ---- records ---------------------------------------------------------------------------------------------------------


def test_records_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = RecordFile(path, {"model": "m", "lengths": (1, 2)}, ("a", "b"))
    records.add({"a": 1, "b": "x", "value": 0.5})
    with path.open("a") as file:
        file.write('{"a": 2, "b": "x", "val')
    again = RecordFile(path, {"model": "m", "lengths": (1, 2)}, ("a", "b"))
    assert again.get(1, "x") == {"a": 1, "b": "x", "value": 0.5}
    assert again.get(2, "x") is None
    again.add({"a": 2, "b": "x", "value": 1.0})
    assert len(RecordFile(path, {"model": "m", "lengths": [1, 2]}, ("a", "b"))) == 2


def test_records_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    RecordFile(path, {"model": "m", "seed": 0}, ("a",))
    with pytest.raises(ValueError, match="seed=0, now 1"):
        RecordFile(path, {"model": "m", "seed": 1}, ("a",))
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="expected the records of an earlier run"):
        RecordFile(path, {}, ("a",))


# ---- names of caches -------------------------------------------------------------------------------------------------


def test_cache_texts_become_caches(model: Any) -> None:
    given = CacheDefaults(window=16, sinks=3)
    made = parse_caches(["dynamic", "packed", "packed:key_bits=4,value_bits=1.5,sinks=0"], model, given)
    kinds = {spec: make() for spec, make in made.items()}
    assert isinstance(kinds["dynamic"], DynamicCache)
    plain, changed = kinds["packed"].skvq_config, kinds["packed:key_bits=4,value_bits=1.5,sinks=0"].skvq_config
    assert (plain.key_bits, plain.window, plain.sinks) == (2, 16, 3)
    assert (changed.key_bits, changed.value_bits, changed.window, changed.sinks) == (4, 1.5, 16, 0)
    assert made["packed"]() is not made["packed"]()


def test_options_of_a_stream_are_nested() -> None:
    assert parse_options("packed", "window=8,keys.rotation=identity,keys.clip=0.9,keys.symmetric=false") == {
        "window": 8,
        "keys": {"rotation": "identity", "clip": 0.9, "symmetric": False},
    }


def fitted_plan(model: Any, path: Path, texts: list[Text]) -> Path:
    stream = StreamPlan(StreamOptions(bits=4))
    pairs = dict.fromkeys(range(model.config.num_hidden_layers), (stream, stream))
    config = SkvqConfig(window=16, sinks=3)
    QuantizationPlan.for_model(model, config, pairs, method="test", texts=digests(texts)).save(path)
    return path


def test_a_plan_is_read_once_and_refused_on_its_own_texts(model: Any, tmp_path: Path) -> None:
    path = fitted_plan(model, tmp_path / "a", [Text("mine", PROSE)])
    given = CacheDefaults(window=8, sinks=2, evaluation=[Text("other", "x" * 99)])
    make = parse_cache(f"plan:{path},sinks=0", model, given)
    parse_cache(f"method:plan:{path}", model, given)
    path.unlink()
    assert (make().skvq_config.window, make().skvq_config.sinks) == (8, 0)
    fitted_plan(model, path, [Text("mine", PROSE)])
    for kind in ("plan", "method:plan"):
        with pytest.raises(ValueError, match=f"cache '{kind}:{path}': plan '{path}' was fitted to 'mine'"):
            parse_cache(f"{kind}:{path}", model, CacheDefaults(evaluation=[Text("its copy", PROSE)]))


without_fp8 = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
)


@without_fp8
def test_a_cache_of_transformers_in_fp8(model: Any) -> None:
    assert isinstance(parse_cache("fp8", model)(), QuantizedCache)
    with pytest.raises(ValueError, match="does not support"):
        parse_cache("fp8:nbits=4", model)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paged", "unknown kind 'paged', expected one of dynamic, packed"),
        ("packed:bits", "'bits' is not an option, expected NAME=VALUE"),
        ("packed:sinks=1,sinks=2", "sinks is given twice"),
        ("packed:key_bits=5", "cache 'packed:key_bits=5': key_bits=5"),
        ("packed:colour=5", "unknown option"),
        ("dynamic:bits=2", "dynamic takes no options"),
        ("plan:", "expected plan:FILE"),
        ("method:nothing", "nothing"),
    ],
)
def test_wrong_cache_texts_are_named(model: Any, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cache(spec, model)


def test_a_cache_is_named_once(model: Any) -> None:
    with pytest.raises(ValueError, match="'dynamic' is given twice"):
        parse_caches(["dynamic", "packed", "dynamic"], model)


# ---- long generation -------------------------------------------------------------------------------------------------

SHORT = LongGenerationOptions(new_tokens=40, bucket=10, chunk=4, temperature=0.5)


def test_measures_of_two_texts() -> None:
    assert long_generation.first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert long_generation.first_difference([1, 2], [1, 2]) == 2
    assert long_generation.similarity([1, 2, 3, 4], [9, 1, 2, 3]) == 0.75
    assert long_generation.repetition([1, 2, 3, 4, 5, 6, 7, 8]) == 0.0
    assert long_generation.repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)
    assert long_generation.repetition([1]) == 0.0


def test_forced_scores_are_those_of_the_whole_text(model: Any) -> None:
    context = shared_prefill.read_context(model, prompts(1, 30))
    text = prompts(1, 20, seed=4)[0].tolist()
    made = {name: make() for name, make in caches(model).items()}
    scores = long_generation.forced_scores(model, context, made, caches(model)["dynamic"](), text, chunk=3)
    whole = model(torch.cat([context.token_ids, torch.tensor([text])], 1)).logits[0].log_softmax(-1)
    nll = -whole[30:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    assert scores["dynamic"]["nll"] == pytest.approx(nll.tolist(), abs=1e-4)
    assert scores["dynamic"]["kl"] == pytest.approx([0.0] * 19, abs=1e-6)
    assert scores["exact"]["kl"] == pytest.approx([0.0] * 19, abs=1e-5)
    assert scores["exact"]["same"] == [1.0] * 19
    assert sum(scores["packed"]["kl"]) / 19 > 1e-3


def test_long_generation_compares_with_the_first_cache(model: Any, tmp_path: Path) -> None:
    path, seen = tmp_path / "records.jsonl", []
    texts = [prompts(1, 30, seed=seed)[0].tolist() for seed in (5, 6)]
    run = lambda which: run_long_generation(  # noqa: E731
        which, texts, caches(model), SHORT, RecordFile(path, {}, long_generation.KEY), lambda n, _: seen.append(n)
    )
    records = run(model)
    assert sum(seen) == 2 * (3 * 40 + 40 + 39)
    rows = {row["cache"]: row for row in long_generation.summary(records, SHORT.bucket)}
    assert (rows["dynamic"]["first_difference"], rows["dynamic"]["kl"]) == (40, None)
    assert (rows["exact"]["equal_tokens"], rows["exact"]["similarity"]) == (1.0, 1.0)
    assert rows["exact"]["kl"] < 1e-5 < 1e-3 < rows["packed"]["kl"]
    assert rows["packed"]["top1_agreement"] < 1.0 == rows["exact"]["top1_agreement"]
    assert rows["packed"]["perplexity_under_reference"] >= 1.0
    buckets = [(row["from"], row["to"]) for row in long_generation.drift(records, 10) if row["cache"] == "packed"]
    assert buckets == [(1, 10), (11, 20), (21, 30), (31, 39)]
    assert "KL up to token" in long_generation.table(records, SHORT.bucket)
    assert run(None) == records  # nothing is left to do


def test_caches_can_be_led_along_a_given_text(model: Any) -> None:
    ids = prompts(1, 60, seed=11)[0]
    options = LongGenerationOptions(new_tokens=25, bucket=10, chunk=4, free=False)
    text, *forced = run_long_generation(
        model, [ids[:35].tolist()], caches(model), options, continuations=[ids[35:].tolist()]
    )
    assert text["token_ids"] == ids[35:].tolist()
    whole = model(ids[None]).logits[0].log_softmax(-1)
    nll = -whole[35:-1].gather(1, ids[36:, None])[:, 0]
    by_name = {record["cache"]: record for record in forced}
    assert by_name["exact"]["nll"] == pytest.approx(nll.tolist(), abs=1e-4)
    assert by_name["packed"]["nll"] != by_name["exact"]["nll"]


def test_the_perplexity_of_a_text_is_full_precisions(model: Any) -> None:
    ids = prompts(1, 30, seed=7)
    [record] = run_long_generation(model, [ids[0].tolist()], {"dynamic": caches(model)["dynamic"]}, SHORT)
    whole = model(torch.cat([ids, torch.tensor([record["token_ids"]])], 1)).logits[0].log_softmax(-1)
    assert record["token_ids"] == whole[29:-1].argmax(-1).tolist()
    nll = -whole[29:-1].max(-1).values.mean()
    assert record["nll"] == pytest.approx(float(nll), abs=1e-4)


def test_the_sampled_text_is_seeded(model: Any) -> None:
    context = shared_prefill.read_context(model, prompts(1, 30))

    def sampled(**changes: Any) -> list[int]:
        options = LongGenerationOptions(new_tokens=20, **{"temperature": 1.0, **changes})
        cache = context.fill(DynamicCache(config=model.config))
        return long_generation.sample(model, cache, context.log_probabilities, 20, options, lambda *_: None)

    assert sampled() == sampled()
    assert sampled() != sampled(seed=1)
    assert sampled(top_p=1e-6) == sampled(temperature=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetrievalOptions(tasks=("x",)), "expected some of needle"),
        (lambda: RetrievalOptions(prefill="none"), "prefill is 'none'"),
        (lambda: RetrievalOptions(lengths=()), "lengths are"),
        (lambda: LongGenerationOptions(new_tokens=1), "new_tokens is 1"),
        (lambda: LongGenerationOptions(temperature=-1.0), "temperature is -1.0"),
        (lambda: LongGenerationOptions(top_p=0.0), "top_p is 0.0"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- the command line ------------------------------------------------------------------------------------------------


def run_command(line: str) -> None:
    parser = argparse.ArgumentParser()
    tasks_cli.add_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args(line.split())
    arguments.run(arguments)


def test_the_commands_write_table_json_and_plot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    common = f"--model {folder} --dtype float32 --threads 1 --texts {text} --window 8 --sinks 2"
    run_command(
        f"retrieval {common} --tasks lines variables --lengths 900 --depths 2 --cases 1 --hops 1 "
        f"--records {tmp_path}/r.jsonl --json {tmp_path}/r.json --plot {tmp_path}/r.png"
    )
    assert "variables" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(row["cache"], row["task"]) for row in report["rows"]] == [
        (cache, task) for task in ("lines", "variables") for cache in ("dynamic", "packed")
    ]
    assert (report["benchmark"], report["settings"]["prefill"], len(report["answers"])) == ("retrieval", "chunk", 8)
    run_command(
        f"generation {common} --prompts 1 --prompt-tokens 40 --new-tokens 30 --bucket 10 --forced-only "
        f"--json {tmp_path}/g.json --plot {tmp_path}/g.png"
    )
    report = json.loads((tmp_path / "g.json").read_text())
    assert report["rows"][1]["cache"] == "packed"
    assert math.isfinite(report["rows"][1]["kl"])
    assert report["rows"][1]["first_difference"] is None
    assert (tmp_path / "r.png").stat().st_size > 5000 < (tmp_path / "g.png").stat().st_size
    run_command(
        f"generation {common} --prompts 1 --prompt-tokens 40 --new-tokens 30 --forced-only --own-text "
        f"--json {tmp_path}/o.json --plot {tmp_path}/o.png"
    )
    own = json.loads((tmp_path / "o.json").read_text())
    assert (own["settings"]["own_text"], report["settings"]["own_text"]) == (True, False)
    texts = [x["records"][0]["token_ids"] for x in (own, report)]
    assert len(texts[0]) == len(texts[1]) == 30
    assert texts[0] != texts[1]


def test_the_commands_refuse_plans_of_their_texts(folder: Path, model: Any, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    path = fitted_plan(model, tmp_path / "plan", [read_text(f"{text}#0-0.5")])
    common = f"--model {folder} --dtype float32 --threads 1 --caches dynamic plan:{path}"
    sizes = "--prompts 1 --prompt-tokens 40 --new-tokens 8 --forced-only"
    for command in (f"retrieval {common} --lengths 900", f"generation {common} {sizes}"):
        with pytest.raises(ValueError, match=r"was fitted to 'prose.txt#0-0.5' .* evaluation text 'prose.txt'"):
            run_command(f"{command} --texts {text}")
    run_command(f"generation {common} {sizes} --texts {text}#0.5-1")
    # the package's own text, where none are given
    fitted_plan(model, path, packaged_texts(["mansfield_park"]))
    with pytest.raises(ValueError, match="was fitted to 'mansfield_park'"):
        run_command(f"generation {common} {sizes}")


def test_a_task_with_data_of_its_own_has_no_texts_to_refuse(folder: Path, model: Any, tmp_path: Path) -> None:
    path = fitted_plan(model, tmp_path / "plan", packaged_texts(["mansfield_park"]))
    parser = argparse.ArgumentParser()
    tasks_cli.add_commands(parser.add_subparsers(required=True))
    line = f"longbench --data {tmp_path} --model {folder} --dtype float32 --caches plan:{path}"
    _, made = tasks_cli._load(parser.parse_args(line.split()))
    assert list(made) == [f"plan:{path}"]
