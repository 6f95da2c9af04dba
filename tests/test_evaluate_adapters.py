"""LongBench's scores and prompts on a made-up file in its form; lm-eval on a made-up task, where it is installed."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from skvq import QuantizedDynamicCache
from skvq.evaluate.adapters import longbench
from skvq.evaluate.adapters.longbench import TASKS, LongBenchOptions, run_longbench
from skvq.evaluate.task_records import RecordFile
from skvq.models import ExtraNotInstalledError
from tiny_directory import save
from tiny_models import build

needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge-score is not installed")
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def caches(model: Any) -> dict[str, Any]:
    options = {"window": 8, "sinks": 2, "keys": {"block": 0}, "values": {"block": 0}}
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "exact": lambda: QuantizedDynamicCache(model.config, key_bits=16, value_bits=16, window=8, sinks=2),
        "packed": lambda: QuantizedDynamicCache(model.config, key_bits=2, value_bits=2, **options),
    }


# ---- LongBench -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "answer", "wanted", "expected"),
    [
        (longbench.word_f1, "The cat, sat.", "a cat sat", 1.0),
        (longbench.word_f1, "cat dog", "cat", 2 / 3),
        (longbench.word_f1, "bird", "cat", 0.0),
        (longbench.word_f1, "", "cat", 0.0),
        (longbench.numbers_share, "Paragraph 7", "Paragraph 7", 1.0),
        (longbench.numbers_share, "7 or 8", "7", 0.5),
        (longbench.numbers_share, "none", "7", 0.0),
        (longbench.code_similarity, "# a comment\nreturn x\n", "return x", 1.0),
        (longbench.code_similarity, "", "return x", 0.0),
    ],
)
def test_scores(score: Any, answer: str, wanted: str, expected: float) -> None:
    assert score(answer, wanted) == pytest.approx(expected)


def test_class_accuracy_shares_between_the_classes_named() -> None:
    classes = ["Date", "City", "Other city", "Person"]
    assert longbench.class_accuracy("It is a City", "City", classes) == 1.0
    assert longbench.class_accuracy("Date or City", "City", classes) == 0.5
    assert longbench.class_accuracy("Person", "City", classes) == 0.0


@needs_rouge
def test_rouge_l_is_of_the_longest_common_subsequence() -> None:
    assert longbench.rouge_l("one two four", "one two three four") == pytest.approx(2 * (1 * 0.75) / 1.75)


def test_rouge_l_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ExtraNotInstalledError, match=r"pip install 'skvq\[tasks\]'"):
        longbench.rouge_l("a", "b")


def test_the_best_right_answer_and_the_first_line_count() -> None:
    example = {"context": "", "input": "", "answers": ["Bern", "the city of Bern"], "all_classes": None}
    assert longbench.score_answer("hotpotqa", "city of Bern", example) == 1.0
    assert longbench.score_answer("triviaqa", "\nBern\nParis Rome", example) == 1.0
    assert longbench.score_answer("hotpotqa", "Bern\nParis Rome", example) < 1.0


def test_the_middle_is_cut() -> None:
    assert longbench.cut_middle(list(range(10)), 4) == [0, 1, 8, 9]
    assert longbench.cut_middle(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert longbench.cut_middle([1, 2], 5) == [1, 2]


def test_every_prompt_holds_the_context() -> None:
    for name, task in TASKS.items():
        assert task.prompt.count("{context}") == 1, name
        assert task.prompt.count("{input}") <= 1, name


def write_data(folder: Path, **tasks: list[dict[str, Any]]) -> None:
    for task, examples in tasks.items():
        lines = [
            json.dumps({"all_classes": None, "language": "en", "length": 3, "dataset": task, "_id": str(i), **example})
            for i, example in enumerate(examples)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def test_longbench_runs_and_goes_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    story = {"context": "A cat sat on a mat. " * 20, "input": "Who sat?", "answers": ["a cat"]}
    code = {"context": "x = 1\n" * 30, "input": "y = ", "answers": ["y = 2"]}
    write_data(tmp_path, hotpotqa=[story, {**story, "input": "Where?"}], **{"repobench-p": [code]})
    path, options = tmp_path / "records", LongBenchOptions(max_tokens=300)
    run = lambda which: run_longbench(  # noqa: E731
        which, tokenizer, caches(model), tmp_path, options, records=RecordFile(path, {}, longbench.KEY)
    )
    records = run(model)
    answers = {(x["task"], x["number"], x["cache"]): x["answer"] for x in records}
    assert len(answers) == 3 * 3
    for task, number in (("hotpotqa", 0), ("hotpotqa", 1), ("repobench-p", 0)):
        assert answers[task, number, "exact"] == answers[task, number, "dynamic"]
    assert any(answers[t, n, "packed"] != answers[t, n, "dynamic"] for t, n, _ in answers)
    rows = longbench.summary(records)
    assert [(row["task"], row["cache"], row["examples"]) for row in rows[:2]] == [
        ("hotpotqa", "dynamic", 2),
        ("hotpotqa", "exact", 2),
    ]
    assert longbench.table(records).splitlines()[-1].startswith("mean")
    assert len(path.read_text().splitlines()) == 1 + 9
    assert run(None) == records  # everything is known: no model is needed


def test_the_prompt_is_asked_in_two_parts_within_its_length(model: Any, tokenizer: Any) -> None:
    example = {"context": "abc " * 200, "input": "Who?", "answers": ["x"]}
    asker = longbench._Asker(model, tokenizer, LongBenchOptions(max_tokens=400), {"hotpotqa": "Q{context}|{input}"})
    first, second = asker.parts("hotpotqa", example)
    assert "".join(tokenizer.convert_ids_to_tokens(second)).endswith("|Who?".replace("|", "<unk>"))
    assert len(first) + len(second) == 400
    whole = LongBenchOptions(max_tokens=400, prefill="whole")
    exact = {"dynamic": caches(model)["dynamic"]}
    in_one = longbench._Asker(model, tokenizer, whole, asker.prompts).answers("hotpotqa", example, exact)
    assert in_one == asker.answers("hotpotqa", example, exact)


def test_missing_and_broken_data_are_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no TASK\.jsonl"):
        run_longbench(model, tokenizer, caches(model), tmp_path, LongBenchOptions())
    with pytest.raises(ValueError, match="expected LongBench's data"):
        longbench.read_examples(tmp_path, "trec")
    (tmp_path / "trec.jsonl").write_text('{"context": ""}\n')
    with pytest.raises(ValueError, match="line 1: no field 'input'"):
        longbench.read_examples(tmp_path, "trec")
    with pytest.raises(ValueError, match="task is 'dureader'"):
        LongBenchOptions(tasks=("dureader",))


# ---- lm-eval ---------------------------------------------------------------------------------------------------------


def adapted(model: Any, tokenizer: Any, kind: str, **options: Any) -> Any:
    from skvq.evaluate.adapters.lm_eval import CacheLM

    tokenizer.eos_token = tokenizer.pad_token = "_"
    return CacheLM(model, tokenizer, caches(model)[kind], max_length=256, **options)


@needs_lm_eval
@pytest.mark.parametrize("chunk", [1, 5])
def test_lm_eval_log_likelihoods_are_the_models_own(model: Any, tokenizer: Any, chunk: int) -> None:
    context, others = tokenizer("a cat sat on the mat " * 4).input_ids, ["and slept.", "x", "and then it ran away"]
    requests = [(("c", text), context, tokenizer(text).input_ids) for text in others]
    requests += [(None, [1], context)]
    found = {
        kind: adapted(model, tokenizer, kind, chunk=chunk)._loglikelihood_tokens(requests, disable_tqdm=True)
        for kind in ("dynamic", "exact", "packed")
    }
    for (_, before, after), (total, is_greedy), exact in zip(requests, found["dynamic"], found["exact"], strict=True):
        scores = model(torch.tensor([before + after])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        wanted = torch.tensor(after)
        assert total == pytest.approx(float(scores.gather(1, wanted[:, None]).sum()), abs=1e-3)
        assert is_greedy == bool((scores.argmax(-1) == wanted).all())
        assert exact[0] == pytest.approx(total, abs=1e-3)
    assert abs(found["packed"][3][0] - found["dynamic"][3][0]) > 1e-2


@needs_lm_eval
def test_lm_eval_cuts_long_contexts_from_the_left(model: Any, tokenizer: Any) -> None:
    context, after = tokenizer("abcdefgh " * 60).input_ids, tokenizer("the end").input_ids
    [(total, _)] = adapted(model, tokenizer, "dynamic")._loglikelihood_tokens([(None, context, after)], True)
    whole = torch.tensor([(context + after)[-257:]])
    scores = model(whole[:, :-1]).logits[0].log_softmax(-1)[-len(after) :]
    assert total == pytest.approx(float(scores.gather(1, torch.tensor(after)[:, None]).sum()), abs=1e-3)


@needs_lm_eval
def test_lm_eval_runs_a_task(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from skvq.evaluate.adapters.lm_eval import run_lm_eval, scores

    lines = [
        {"question": f"Q{i}: " + "word " * 30, "choices": ["yes", "no it is not"], "gold": i % 2} for i in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\n"
    )
    (tmp_path / "tiny_choice.yaml").write_text(
        f"task: tiny_choice\noutput_type: multiple_choice\n{common}doc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "tiny_text.yaml").write_text(
        f"task: tiny_text\noutput_type: generate_until\n{common}doc_to_target: '{{{{choices[gold]}}}}'\n"
        "generation_kwargs:\n  until: ['|']\n  max_gen_toks: 12\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    tokenizer.eos_token = tokenizer.pad_token = "_"
    given = {}
    for kind in ("dynamic", "exact"):
        results = run_lm_eval(
            model,
            tokenizer,
            caches(model)[kind],
            ["tiny_choice", "tiny_text"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
        rows = {row["task"]: row for row in scores(results)}
        assert rows["tiny_choice"]["figure"].startswith("acc")
        assert math.isfinite(rows["tiny_choice"]["value"])
        given[kind] = [sample["resps"] for sample in results["samples"]["tiny_text"]]
    assert given["dynamic"] == given["exact"]


def test_lm_eval_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "skvq.evaluate.adapters.lm_eval", raising=False)
    with pytest.raises(ExtraNotInstalledError, match=r"pip install 'skvq\[tasks\]'"):
        importlib.import_module("skvq.evaluate.adapters.lm_eval")
