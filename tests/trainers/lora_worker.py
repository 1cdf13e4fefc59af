"""Run by test_lora.py: greedy answers of vLLM and transformers, with an adapter and without.

Usage: lora_worker.py BASE ADAPTER MERGED [TEXT …]. The last line is JSON: token ids by kind."""

import json
import sys

import torch

from recipes.compose import compose
from rollouts.engines.vllm import common_options, cpu_options, prepare_import

PROMPTS = [[5, 6, 7], [9, 30, 31, 32], [40, 41]]
NEW_TOKENS = 12


def main(base: str, adapter: str, merged: str, texts: list[str]) -> None:
    prompts = encode(base, texts) if texts else PROMPTS
    answers = {"transformers": in_transformers(merged, prompts)}
    (answers["merged"],) = in_vllm(merged, prompts, [None])
    answers["base"], answers["adapter"] = in_vllm(base, prompts, [None, adapter])
    print(json.dumps(answers))


def encode(base: str, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        for chat in chats
    ]


def in_vllm(path: str, prompts: list[list[int]], adapters: list[str | None]) -> list:
    """The answers of one engine with each of the adapters; None: without one."""
    prepare_import(True, 1)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    config = compose([])
    options = common_options(path, config, torch.float32, 256) | cpu_options(256)
    if any(adapters):
        options |= {"enable_lora": True, "max_lora_rank": 16}
    llm = LLM(**options)
    answers = []
    for adapter in adapters:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False),
            use_tqdm=False,
            lora_request=None if adapter is None else LoRARequest("adapter", 1, adapter),
        )
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    llm.llm_engine.engine_core.shutdown()
    return answers


def in_transformers(path: str, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # The end token is written as any other.
    model.generation_config.eos_token_id = None
    answers = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        # Without a mask, transformers takes end tokens in the prompt for padding.
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        answers.append(tokens[0, len(ids) :].tolist())
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:4], texts=sys.argv[4:])
