"""The offline engine, in process: chunked prefill (32 tokens a step), few KV blocks, prefix cache on, fp32."""

import pytest

import fv_steer
from reference import Reference
from requests_16 import STEERING, prompts

pytestmark = pytest.mark.serving
N = 32


@pytest.fixture(scope="module")
def llm(model_dir, pack_files):
    from vllm import LLM

    engine = LLM(
        str(model_dir), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=16, block_size=32,
        max_num_batched_tokens=32, num_gpu_blocks_override=24, enable_prefix_caching=True, disable_log_stats=False,
        additional_config=fv_steer.vllm_config(packs=pack_files),
    )  # fmt: skip
    yield engine
    engine.llm_engine.engine_core.shutdown()


def run(llm, token_ids, steering, n=N, **options):
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=n, ignore_eos=True, logprobs=0, extra_args=fv_steer.request_args(s), **options
        )
        for s in steering
    ]
    return llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)


def tokens(output):
    return list(output.outputs[0].token_ids)


def logprobs(output):
    return [step[token].logprob for token, step in zip(tokens(output), output.outputs[0].logprobs, strict=True)]


@pytest.fixture(scope="module")
def preemptions(llm):
    """Counts what the scheduler preempts."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    seen = []
    preempt = scheduler._preempt_request

    def counting(request, *args, **kwargs):
        seen.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counting
    return seen


def test_mixed_batch_equals_hf_one_by_one(llm, preemptions, model_dir, pack_files):
    """16 mixed requests in one batch, chunked and preempted, give HF's greedy tokens, logprobs within 1e-3."""
    llm.reset_prefix_cache()
    outputs = run(llm, prompts(), STEERING)
    assert preemptions, "the batch was meant to be too large for the KV cache"
    reference = Reference(model_dir, pack_files)
    for prompt, steering, output in zip(prompts(), STEERING, outputs, strict=True):
        expected, expected_logprobs = reference.greedy(prompt, steering, 8)
        assert tokens(output)[:8] == expected, steering
        assert logprobs(output)[:8] == pytest.approx(expected_logprobs, abs=1e-3), steering
    unsteered, _ = reference.greedy(prompts()[1], None, 8)
    assert unsteered != tokens(outputs[1])[:8]


def test_alone_equals_in_the_batch(llm, preemptions):
    """Each request alone gives the tokens it gave in the preempted, chunked batch."""
    llm.reset_prefix_cache()
    together = run(llm, prompts(), STEERING)
    for index, (prompt, steering) in enumerate(zip(prompts(), STEERING, strict=True)):
        llm.reset_prefix_cache()
        assert tokens(run(llm, [prompt], [steering])[0]) == tokens(together[index]), steering


def test_unsteered_rows_are_bit_identical_to_a_batch_with_a_zero_pack(llm):
    """Whatever its batch-mates are steered by, an unsteered request's logprobs do not change by a bit."""
    steered = [None if s is None else {**s, "pack": "one"} for s in STEERING]
    zero = [None if s is None else {**s, "pack": "zero"} for s in STEERING]
    llm.reset_prefix_cache()
    first = run(llm, prompts(), steered)
    llm.reset_prefix_cache()
    second = run(llm, prompts(), zero)
    for s, a, b in zip(steered, first, second, strict=True):
        if s is None:
            assert logprobs(a) == logprobs(b)
            assert tokens(a) == tokens(b)
    assert tokens(first[1]) != tokens(second[1])


@pytest.mark.parametrize("apply", ["last", "generation", "all"])
def test_steered_kv_is_never_read_by_others(llm, apply):
    """After a steered request, an unsteered one over its prompt and its answer equals a fresh engine exactly."""
    prompt = prompts(seed=1)[0] * 20
    prompt = (prompt * 40)[:108]
    llm.reset_prefix_cache()
    answer = tokens(run(llm, [prompt], [{"pack": "one", "apply": apply}], n=40)[0])
    after = run(llm, [prompt + answer], [None], n=8)[0]
    llm.reset_prefix_cache()
    fresh = run(llm, [prompt + answer], [None], n=8)[0]
    assert fresh.num_cached_tokens == 0
    assert after.num_cached_tokens == (0 if apply == "all" else 96)
    assert logprobs(after) == logprobs(fresh)


def test_unsteered_part_of_a_shared_prompt_is_a_hit(llm):
    """Steered after unsteered, unsteered after steered, and other scales: the first 96 of 108 tokens are shared."""
    prompt = [100 + i for i in range(108)]
    for first, second in [
        (None, {"pack": "one"}),
        ({"pack": "one"}, None),
        ({"pack": "one"}, {"pack": "two", "scale": 3}),
    ]:
        llm.reset_prefix_cache()
        assert run(llm, [prompt], [first], n=2)[0].num_cached_tokens == 0
        assert run(llm, [prompt], [second], n=2)[0].num_cached_tokens == 96


def test_same_steering_reuses_its_own_kv(llm):
    """With `apply="all"` the same spec hits its own blocks, another scale none; logprobs stay those of a fresh run."""
    prompt = [100 + i for i in range(108)]
    spec = {"pack": "one", "apply": "all"}
    llm.reset_prefix_cache()
    fresh = run(llm, [prompt], [spec], n=4)[0]
    again = run(llm, [prompt], [spec], n=4)[0]
    other = run(llm, [prompt], [{**spec, "scale": 0.25}], n=4)[0]
    assert (again.num_cached_tokens, other.num_cached_tokens) == (96, 0)
    assert logprobs(again) == logprobs(fresh)


def test_several_samples_of_one_request(llm):
    """n=3 samples from the single likeliest token are each the answer of n=1."""
    from vllm import SamplingParams

    extra = fv_steer.request_args({"pack": "two", "apply": "generation"})
    request = {"prompt_token_ids": prompts()[3]}
    answers = []
    for n in (1, 3):
        # Greedy sampling allows n=1 only; top_k=1 draws the same tokens.
        params = SamplingParams(temperature=1, top_k=1, n=n, max_tokens=8, extra_args=extra)
        output = llm.generate([request], params, use_tqdm=False)[0]
        answers.append([list(sample.token_ids) for sample in output.outputs])
    assert answers[1] == answers[0] * 3


def test_list_adds_up(llm):
    """Two halves of a pack are the whole pack."""
    prompt = prompts()[2]
    whole = run(llm, [prompt], [{"pack": "one", "scale": 2.0}])[0]
    halves = run(llm, [prompt], [[{"pack": "one", "scale": 0.5}, {"pack": "one", "scale": 1.5}]])[0]
    assert tokens(whole) == tokens(halves)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"fv_steer": [{"pack": "nope"}]}, "unknown steering pack 'nope'; loaded: one, two, zero"),
        ({"steering_pack": "one", "steering_scale": True}, "steering.scale"),
        ({"steering_pack": "one", "steering_scal": 1.0}, "unknown field 'steering_scal'"),
        ({"fv_steer": {"pack": "one", "mode": "fv", "layer": 30}}, "layers 0 to 29"),
        ({"fv_steer": [{"pack": "one", "apply": "last"}, {"pack": "two", "apply": "all"}]}, "share one 'apply'"),
    ],
)
def test_bad_offline_requests_are_refused(llm, extra, message):
    """A malformed spec never reaches the engine."""
    from vllm import SamplingParams

    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args=extra), use_tqdm=False)
