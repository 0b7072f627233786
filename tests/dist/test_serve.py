"""`autopar serve` answers as one process generates."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.dist

JSON = {"Content-Type": "application/json"}
# of the length that the server has programs for
PROMPTS = ("once upon a ", "time there w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama and a tokenizer whose tokens are letters."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = str(tmp_path_factory.mktemp("model"))
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c.isascii() or c in "ĠĊ"]
    tokens = Tokenizer(models.BPE({c: k for k, c in enumerate(letters)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(letters), initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    """Its address; it has ended well when the tests have."""
    command = [sys.executable, "-m", "autopar", "serve", folder, "--mesh", "2", "--port", "0"]
    command += ["--no-warm-up", "--batch", "3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"serving .* on 2 ranks at (http://\S+)", line):
            break
    else:
        pytest.fail("".join(lines))
    yield found[1]
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0, rest
    assert time.monotonic() - begin < 5, rest


def asked(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), JSON)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def continued(folder, text, count):
    """What one process generates."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_completions_are_those_of_one_process(server, folder):
    for prompt in PROMPTS:
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
        answer = json.loads(asked(f"{server}/v1/completions", **body))
        assert answer["choices"][0]["text"] == continued(folder, prompt, 20)
        assert answer["usage"]["completion_tokens"] == 20


def test_waiting_requests_are_a_batch(server, folder):
    """Behind another one, on both ranks; a prompt that is too long is refused beside them."""
    counts = {PROMPTS[0]: 50, PROMPTS[1]: 9, "a": 20, "once upon": 12}
    with ThreadPoolExecutor(len(counts)) as pool:
        answers = {}
        for prompt, count in counts.items():
            body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
            answers[prompt] = pool.submit(asked, f"{server}/v1/completions", **body)
            time.sleep(0.05 if prompt == PROMPTS[0] else 0)
        with pytest.raises(urllib.error.HTTPError) as failed:
            asked(f"{server}/v1/completions", prompt="a" * 2048, max_tokens=1)
        assert failed.value.code == 400
        assert "has 2,048 tokens, and the model has 2,048 positions" in failed.value.read().decode()
        for prompt, count in counts.items():
            choice = json.loads(answers[prompt].result())["choices"][0]
            assert choice["text"] == continued(folder, prompt, count)
            assert choice["finish_reason"] == "length"


def test_a_chat_is_streamed(server, folder):
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 20, "temperature": 0, "stream": True}
    lines = asked(f"{server}/v1/chat/completions", **body).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    deltas = [c["choices"][0]["delta"].get("content") or "" for c in chunks]
    assert len([d for d in deltas if d]) > 1
    assert "".join(deltas) == continued(folder, "user: hello\n", 20)


def test_a_bad_request_is_told_and_the_next_one_served(server, folder):
    bad = json.dumps({"max_new_tokens": 4, "cache_implementation": "quantized"})
    with pytest.raises(urllib.error.HTTPError) as failed:
        asked(f"{server}/v1/completions", prompt=PROMPTS[0], generation_config=bad)
    assert failed.value.code == 400
    assert "cache_implementation='quantized'" in failed.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as failed:
        asked(f"{server}/v1/completions", prompt=PROMPTS[0], max_tokens="many")
    assert failed.value.code == 400
    assert "max_tokens: Input should be a valid integer" in failed.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as failed:  # before a stream begins, too
        asked(f"{server}/v1/completions", prompt=PROMPTS[0], stop=["\u00e9" * 3], stream=True)
    assert failed.value.code == 400
    assert "stop (stop_strings): Stop string" in failed.value.read().decode()
    after = asked(
        f"{server}/v1/completions", prompt=PROMPTS[1], max_tokens=9, temperature=0, stop=[]
    )
    assert json.loads(after)["choices"][0]["text"] == continued(folder, PROMPTS[1], 9)


def test_a_client_that_leaves_ends_its_generation(server, folder):
    host, port = server.removeprefix("http://").split(":")
    took = []
    for stream in (False, False, True):  # the first makes the program of a long cache
        body = {"prompt": PROMPTS[0], "max_tokens": 2000, "temperature": 0, "stream": stream}
        with contextlib.closing(http.client.HTTPConnection(host, int(port))) as client:
            client.request("POST", "/v1/completions", json.dumps(body), JSON)
            time.sleep(1)
        begin = time.monotonic()
        after = asked(f"{server}/v1/completions", prompt=PROMPTS[1], max_tokens=9, temperature=0)
        took.append(time.monotonic() - begin)
        assert json.loads(after)["choices"][0]["text"] == continued(folder, PROMPTS[1], 9)
    assert max(took[1:]) < 3, took  # all tokens take more than 10 seconds
