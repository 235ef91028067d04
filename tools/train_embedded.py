#!/usr/bin/env python
"""Train the small GPT-2 that fastgen carries inside its Python package.

The corpus is text that every machine with Python already has: the docstrings of CPython's standard
library. Those of the Python modules are read from the source with ``ast``; those of the modules
written in C are read from the imported modules. Nothing is downloaded.

The script does everything in one run:

1. collect the docstrings, clean and de-duplicate them, and hold out about 2 % for validation;
2. train a byte-level BPE (GPT-2's pre-tokenizer) of 2048 tokens, ``<|endoftext|>`` being the last;
3. train a GPT-2 (pre-norm, tanh GELU, tied embedding) with Paddle on the CPU: AdamW for the
   embeddings, norms and biases, Muon for the matrices. It runs in ``--threads`` processes of one
   thread each that average their gradients through shared memory, since Paddle's CPU operators
   hardly use a second thread: on the machine below, two such processes are about 1.5 times as fast
   as one of two threads;
4. write a HuggingFace GPT-2 directory: float16 ``model.safetensors``, ``config.json``, tokenizer.

The learning rate follows the clock, so that its decay ends when ``--minutes`` are over, whatever
the machine. The directory is rewritten at every checkpoint: an early version can be used meanwhile.

The weights in the repository took 25 minutes of CPU time on each of two cores of an AMD EPYC (65
minutes by the clock, because the machine was busy with other work; hence ``--clock cpu``), with
PaddlePaddle 2.6.2 and Python 3.11.7::

    python tools/train_embedded.py --minutes 25 --clock cpu --threads 2 \\
        --output fastgen/models/gpt2-docstrings

The run depends on the time each step takes, so it does not reproduce the same bits; another Python
version also brings another corpus.

Needs: paddlepaddle, numpy, safetensors, tokenizers, tqdm.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import platform
import sys
import sysconfig
import time
import warnings
import zlib  # noqa: F401  (before paddle, whose own zlib breaks a later import of it)
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

# These are read once, when paddle loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("FLAGS_use_stride_kernel", "0")  # strided views make CPU training 20 % slower
if Path("/proc/cpuinfo").exists():
    _cpu = Path("/proc/cpuinfo").read_text()
    if "AuthenticAMD" in _cpu and "avx2" in _cpu:
        # Paddle's MKL (2019) takes a slow path on AMD: this makes products 2-3 times as fast.
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")

import paddle
import paddle.nn.functional as F
from paddle import nn

EOT = "<|endoftext|>"
PROMPTS = ("Return the", "The following functions are", "Create a new")


# Corpus

SKIPPED_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}


def source_docstrings() -> Iterator[str]:
    """Docstrings of every module, class and function in the standard library's Python files."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_DIRECTORIES.intersection(path.relative_to(stdlib).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node, clean=False) or ""


def extension_docstrings() -> Iterator[str]:
    """Docstrings of the standard library's C modules, their classes, methods and functions."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx")):
            continue
        try:
            origin = importlib.util.find_spec(name).origin or ""
            if origin != "built-in" and not origin.endswith((".so", ".pyd")):
                continue
            module = importlib.import_module(name)
        except (ImportError, AttributeError, ValueError):
            continue
        objects = [module]
        for _, member in sorted(vars(module).items()):
            if isinstance(member, type):
                objects.append(member)
                objects.extend(
                    value for _, value in sorted(vars(member).items()) if hasattr(value, "__get__")
                )
            elif callable(member):
                objects.append(member)
        for item in objects:
            text = getattr(item, "__doc__", None)
            yield text if isinstance(text, str) else ""


def collect_documents() -> list[str]:
    """All docstrings, cleaned, without repetitions, in an order set by the Python version."""
    documents: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sources in (source_docstrings(), extension_docstrings()):
            for text in sources:
                text = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
                if len(text) >= 8:
                    documents.setdefault(text)
    return list(documents)


# Tokenizer


def train_tokenizer(documents: list[str], vocab_size: int):
    """A byte-level BPE as GPT-2's; ``<|endoftext|>`` has the last id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(documents, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = {**model["vocab"], EOT: len(model["vocab"])}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([EOT])
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(EOT) != vocab_size - 1:
        raise RuntimeError(f"the text is too short for {vocab_size} tokens")
    return tokenizer, vocab, merges


# Model


@dataclass(frozen=True)
class Shape:
    """The size of the network: about 3.5 million parameters."""

    vocab_size: int = 2048
    positions: int = 256
    hidden: int = 224
    layers: int = 5
    heads: int = 7


class Block(nn.Layer):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width = shape.hidden
        normal = nn.initializer.Normal(std=0.02)
        residual = nn.initializer.Normal(std=0.02 / math.sqrt(2 * shape.layers))
        self.heads, self.dropout = shape.heads, dropout
        self.ln_1 = nn.LayerNorm(width, epsilon=1e-5)
        self.c_attn = nn.Linear(width, 3 * width, weight_attr=normal)
        self.attn_c_proj = nn.Linear(width, width, weight_attr=residual)
        self.ln_2 = nn.LayerNorm(width, epsilon=1e-5)
        self.c_fc = nn.Linear(width, 4 * width, weight_attr=normal)
        self.mlp_c_proj = nn.Linear(4 * width, width, weight_attr=residual)

    def forward(self, x: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        qkv = self.c_attn(self.ln_1(x)).reshape([batch, length, 3, self.heads, size])
        q, k, v = qkv.transpose([2, 0, 3, 1, 4]).unbind(0)
        scores = paddle.matmul(q * size**-0.5, k, transpose_y=True) + mask
        heads = (
            paddle.matmul(F.softmax(scores), v)
            .transpose([0, 2, 1, 3])
            .reshape([batch, length, width])
        )
        x = x + F.dropout(self.attn_c_proj(heads), self.dropout, training=self.training)
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate=True)
        return x + F.dropout(self.mlp_c_proj(hidden), self.dropout, training=self.training)


class GPT2(nn.Layer):
    """GPT-2 with a tied embedding: PaddleNLP's ``GPTLMHeadModel`` with a fused QKV."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        normal = nn.initializer.Normal(std=0.02)
        self.shape, self.dropout = shape, dropout
        self.wte = nn.Embedding(shape.vocab_size, shape.hidden, weight_attr=normal)
        self.wpe = nn.Embedding(shape.positions, shape.hidden, weight_attr=normal)
        self.blocks = nn.LayerList([Block(shape, dropout) for _ in range(shape.layers)])
        self.ln_f = nn.LayerNorm(shape.hidden, epsilon=1e-5)
        self._future = np.triu(np.full((shape.positions, shape.positions), -1e9, np.float32), 1)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """Logits ``[batch, length, vocab_size]`` of ids ``[batch, length]``."""
        length = ids.shape[1]
        mask = paddle.to_tensor(self._future[:length, :length])
        x = self.wte(ids) + self.wpe(paddle.arange(length))
        x = F.dropout(x, self.dropout, training=self.training)
        for block in self.blocks:
            x = block(x, mask)
        return paddle.matmul(self.ln_f(x), self.wte.weight, transpose_y=True)

    def loss(self, windows: np.ndarray) -> paddle.Tensor:
        """Mean cross-entropy (nats per token) of windows ``[batch, length + 1]``."""
        windows = paddle.to_tensor(windows)
        return F.cross_entropy(self(windows[:, :-1]), windows[:, 1:].unsqueeze(-1))

    def hugging_face_state(self) -> dict[str, np.ndarray]:
        """Float16 weights under HuggingFace's names (Conv1D is [in, out], as Paddle's Linear)."""
        state = {}
        for name, value in self.state_dict().items():
            name = name.replace("blocks.", "h.").replace("attn_c_proj", "attn.c_proj")
            name = name.replace("mlp_c_proj", "mlp.c_proj").replace(".c_attn", ".attn.c_attn")
            state[name.replace(".c_fc", ".mlp.c_fc")] = value.numpy().astype(np.float16)
        return state


@paddle.no_grad()
def validation_loss(model: GPT2, stream: np.ndarray, batch: int = 8) -> float:
    """Mean loss over the stream, cut into full windows one after the other."""
    model.eval()
    length = model.shape.positions
    count = (len(stream) - 1) // length
    windows = np.stack([stream[i * length : i * length + length + 1] for i in range(count)])
    losses = [
        float(model.loss(windows[i : i + batch])) * len(windows[i : i + batch])
        for i in range(0, count, batch)
    ]
    model.train()
    return sum(losses) / count


@paddle.no_grad()
def complete(
    model: GPT2, ids: list[int], end: int, top_k: int, rng: np.random.Generator, tokens: int = 80
) -> list[int]:
    """Continue ``ids`` by at most ``tokens``; ``top_k`` 1 is greedy."""
    model.eval()
    ids = list(ids)
    for _ in range(tokens):
        logits = model(paddle.to_tensor([ids]))[0, -1].numpy().astype(np.float64)
        best = np.argsort(-logits, kind="stable")[:top_k]
        weights = np.exp(logits[best] - logits[best].max())
        token = int(rng.choice(best, p=weights / weights.sum()))
        if token == end:
            break
        ids.append(token)
    model.train()
    return ids


# Training


def pack(documents: list[np.ndarray], end: int) -> np.ndarray:
    """One stream: ``<|endoftext|>`` before every document and after the last."""
    separator = np.array([end], np.int64)
    return np.concatenate(
        [part for document in documents for part in (separator, document)] + [separator]
    )


def windows(documents: list[np.ndarray], end: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """For ever: shuffle the documents, pack, cut windows from a random start, shuffle these."""
    rng = np.random.default_rng(seed)
    while True:
        stream = pack([documents[i] for i in rng.permutation(len(documents))], end)
        starts = np.arange(int(rng.integers(length)), len(stream) - length - 1, length)
        for start in rng.permutation(starts):
            yield stream[start : start + length + 1]


class Shared:
    """The workers' common memory: a row of gradients for each of them, the clock, and a barrier."""

    def __init__(self, workers: int, parameters: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers, self.parameters = workers, parameters
        self.memory = context.RawArray("f", workers * parameters)
        self.clock = context.RawValue("d", 0.0)
        self.barrier = context.Barrier(workers, timeout=1800)

    def average(self, rank: int, parameters: list[paddle.Tensor]) -> None:
        """Replace every worker's gradients by their mean; the same bits in every worker."""
        if self.workers == 1:
            return
        rows = np.frombuffer(self.memory, np.float32).reshape(self.workers, self.parameters)
        ends = np.cumsum([p.size for p in parameters])
        for p, end in zip(parameters, ends):
            rows[rank, end - p.size : end] = p.grad.numpy().ravel()
        self.barrier.wait()
        for p, end in zip(parameters, ends):
            p.grad.set_value(rows[:, end - p.size : end].mean(axis=0).reshape(p.shape))
        self.barrier.wait()


class Muon:
    """Momentum whose update is made orthogonal (Jordan 2024), for the matrices inside the layers.

    With so few steps this matters: at equal CPU time (3 minutes of one core, rate 0.002) the
    validation loss was 4.89, against 5.73 with AdamW for everything. The update is scaled to the
    size that AdamW's has (Liu et al. 2025), so both take the same learning rate. Each worker makes
    its share of the matrices.
    """

    def __init__(self, parameters: list[paddle.Tensor], width: int, decay: float) -> None:
        self.parameters, self.width, self.decay = parameters, width, decay
        self.momentum = [paddle.zeros_like(p) for p in parameters]

    def pieces(self, value: paddle.Tensor) -> list[paddle.Tensor]:
        """[in, out] as matrices [width, *]: Q, K and V are three, c_proj is laid on its side."""
        if value.shape[0] > self.width:
            return [value.t()]
        return value.split(3, axis=1) if value.shape[1] == 3 * self.width else [value]

    @staticmethod
    def orthogonal(update: paddle.Tensor) -> paddle.Tensor:
        """Nearly the nearest matrix with orthonormal rows, by four Newton-Schulz steps."""
        x = update / (update.norm() + 1e-7)
        for _ in range(4):
            gram = paddle.matmul(x, x, transpose_y=True)
            x = 3.4445 * x + paddle.matmul(2.0315 * paddle.matmul(gram, gram) - 4.775 * gram, x)
        return x * (0.2 * math.sqrt(max(x.shape)))

    @paddle.no_grad()
    def step(self, learning_rate: float, rank: int, shared: Shared) -> None:
        rows = np.frombuffer(shared.memory, np.float32)
        ends = np.cumsum([p.size for p in self.parameters])
        for i in range(rank, len(self.parameters), shared.workers):
            p = self.parameters[i]
            self.momentum[i] = 0.95 * self.momentum[i] + p.grad
            parts = [
                self.orthogonal(part) for part in self.pieces(p.grad + 0.95 * self.momentum[i])
            ]
            update = parts[0].t() if p.shape[0] > self.width else paddle.concat(parts, axis=1)
            rows[ends[i] - p.size : ends[i]] = update.numpy().ravel()
        shared.barrier.wait()
        for p, end in zip(self.parameters, ends):
            update = paddle.to_tensor(rows[end - p.size : end].reshape(p.shape))
            p.set_value(p * (1 - learning_rate * self.decay) - learning_rate * update)
            p.clear_gradient()
        shared.barrier.wait()


@dataclass
class Job:
    """All that a worker has to know."""

    options: argparse.Namespace
    shape: Shape
    training: list[np.ndarray]
    validation: list[np.ndarray]
    end: int
    started: float


def train(rank: int, job: Job, shared: Shared, save: Callable | None = None) -> None:
    """Train until the time is over. Worker 0 also shows progress and saves checkpoints."""
    options, shape = job.options, job.shape
    paddle.set_device("cpu")
    paddle.seed(options.seed)
    model = GPT2(shape, options.dropout)
    paddle.seed(options.seed + 1 + rank)  # the same weights, but another dropout, in every worker
    parameters = list(model.parameters())
    matrices = [p for p in model.blocks.parameters() if len(p.shape) == 2]
    inside = {p.name for p in matrices}
    muon = Muon(matrices, shape.hidden, decay=0.1)
    adam = paddle.optimizer.AdamW(
        learning_rate=options.learning_rate,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        apply_decay_param_fun={model.wte.weight.name, model.wpe.weight.name}.__contains__,
        parameters=[p for p in parameters if p.name not in inside],
        grad_clip=nn.ClipGradByGlobalNorm(1.0),
    )
    source = windows(job.training, job.end, shape.positions, options.seed)
    per_worker = options.batch // options.threads
    clock = time.process_time if options.clock == "cpu" else time.time
    begun = clock()
    budget = options.minutes * 60 - (time.time() - job.started)
    held_out = pack(job.validation, job.end) if rank == 0 else None
    bar = tqdm(total=round(budget), unit="s", file=sys.stderr, mininterval=10, disable=rank != 0)
    step, average, speed, next_save = 0, 0.0, 0.0, options.checkpoint_minutes * 60
    while True:
        if rank == 0:
            shared.clock.value = clock() - begun
        batch = np.stack([next(source) for _ in range(options.batch)])
        loss = model.loss(batch[rank * per_worker : (rank + 1) * per_worker])
        loss.backward()
        shared.average(rank, parameters)
        progress = (
            shared.clock.value / budget
        )  # worker 0 sets it again only after the barrier in average()
        if progress >= 1.0:
            break
        warm_up = min(1.0, progress / 0.02)
        adam.set_lr(
            options.learning_rate * warm_up * max(1e-3, 0.5 * (1 + math.cos(math.pi * progress)))
        )
        muon.step(adam.get_lr(), rank, shared)
        adam.step()
        adam.clear_grad()
        step += 1
        if rank == 0:
            average += (float(loss) - average) * max(0.01, 1 / step)
            elapsed = clock() - begun
            bar.n = min(round(elapsed), bar.total)
            speed = step * options.batch * shape.positions / elapsed
            bar.set_postfix_str(
                f"step {step}, train loss {average:.3f}, {speed:.0f} tokens/s", refresh=False
            )
            bar.update(0)
            if elapsed > next_save:
                held = validation_loss(model, held_out)
                tqdm.write(
                    f"{elapsed / 60:.1f} min: train {average:.3f}, validation {held:.3f}",
                    file=sys.stderr,
                )
                save(model, step, elapsed, average, held, speed)
                next_save = elapsed + options.checkpoint_minutes * 60
    bar.close()
    if rank == 0:
        save(
            model,
            step,
            clock() - begun,
            average,
            validation_loss(model, held_out),
            speed,
            final=True,
        )


# Output


def write(directory: Path, name: str, content: bytes | str) -> None:
    """Write a file in one go: a reader sees the old one or the new one."""
    temporary = directory / f".{name}.tmp"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(directory / name)


def write_tokenizer(
    directory: Path, tokenizer, vocab: dict[str, int], merges: list[tuple[str, str]]
) -> None:
    write(directory, "tokenizer.json", tokenizer.to_str(pretty=False))
    write(directory, "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write(directory, "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def write_config(directory: Path, shape: Shape, end: int) -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.positions,
        "n_ctx": shape.positions,
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": 4 * shape.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    write(directory, "config.json", json.dumps(config, indent=2) + "\n")


README = """# gpt2-docstrings

A GPT-2 of {parameters:,} parameters ({layers} layers, {heads} heads, width {hidden}, {positions}
positions, {vocab_size} byte-level BPE tokens) that writes text in the manner of Python's
documentation. It is here so that fastgen can be tried, tested and measured without a download; it
knows nothing and is good for nothing else.

- Text: {count:,} docstrings of the standard library of CPython {python} (Python and C modules,
  tests left out), {characters:,} characters, {tokens:,} tokens. {held_out} of the docstrings were
  held out for validation.
- Training: PaddlePaddle {paddle} on {threads} CPU cores, {minutes:.0f} minutes of {clock},
  {steps:,} steps of {batch_tokens:,} tokens: {epochs:.1f} passes over the text, {speed:,.0f}
  tokens/s.
- Loss in nats per token: training {train_loss:.3f} (running mean, with dropout), validation
  {validation_loss:.3f} (perplexity {perplexity:.1f}). Docstrings repeat one another, so some
  held-out text resembles training text.
- Command: `{command}`
- Format: HuggingFace GPT-2, float16. `<|endoftext|>` ({end}) separates documents and is bos, eos
  and pad.

The text is CPython's, under the Python Software Foundation License
(https://docs.python.org/3/license.html).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--minutes", type=float, default=35.0, help="time budget of the whole run")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: count one worker's CPU time: a busy machine takes longer, but trains as much",
    )
    parser.add_argument(
        "--output", type=Path, default=root / "fastgen" / "models" / "gpt2-docstrings"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="worker processes, of one thread each",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="windows of 256 tokens in a step, over all workers"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    options = parser.parse_args()
    if options.threads < 1 or options.batch % options.threads:
        parser.error("--batch must be a multiple of --threads")
    started = time.time()

    documents = collect_documents()
    shape = Shape()
    tokenizer, vocab, merges = train_tokenizer(documents, shape.vocab_size)
    end = vocab[EOT]
    encoded = [np.array(item.ids, np.int64) for item in tokenizer.encode_batch(documents)]
    order = np.random.default_rng(options.seed).permutation(len(encoded))
    held_out = len(encoded) // 50
    characters, tokens = sum(map(len, documents)), sum(len(ids) + 1 for ids in encoded)
    parameters = sum(p.size for p in GPT2(shape).parameters())
    print(
        f"{len(documents)} docstrings, {characters} characters, {tokens} tokens; "
        f"{held_out} docstrings held out; {parameters} parameters; "
        f"prepared in {time.time() - started:.0f} s",
        file=sys.stderr,
    )

    options.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.output, tokenizer, vocab, merges)
    write_config(options.output, shape, end)
    job = Job(
        options,
        shape,
        [encoded[i] for i in order[held_out:]],
        [encoded[i] for i in order[:held_out]],
        end,
        started,
    )

    def save(
        model: GPT2,
        step: int,
        elapsed: float,
        train_loss: float,
        validation: float,
        speed: float,
        final: bool = False,
    ) -> None:
        from safetensors.numpy import save as to_bytes

        write(
            options.output,
            "model.safetensors",
            to_bytes(model.hugging_face_state(), metadata={"format": "pt"}),
        )
        readme = README.format(
            parameters=parameters,
            layers=shape.layers,
            heads=shape.heads,
            hidden=shape.hidden,
            positions=shape.positions,
            vocab_size=shape.vocab_size,
            count=len(documents),
            python=platform.python_version(),
            characters=characters,
            tokens=tokens,
            held_out=held_out,
            paddle=paddle.__version__,
            threads=options.threads,
            minutes=elapsed / 60,
            clock="wall-clock time" if options.clock == "wall" else "CPU time on each",
            steps=step,
            batch_tokens=options.batch * shape.positions,
            epochs=step * options.batch * shape.positions / tokens,
            speed=speed,
            train_loss=train_loss,
            validation_loss=validation,
            perplexity=math.exp(validation),
            command=" ".join(["python tools/train_embedded.py", *sys.argv[1:]]),
            end=end,
        )
        write(options.output, "README.md", readme)
        if final:
            size = sum(path.stat().st_size for path in options.output.iterdir())
            print(
                f"{step} steps, train {train_loss:.4f}, validation {validation:.4f}, {size} bytes",
                file=sys.stderr,
            )
            rng = np.random.default_rng(options.seed)
            for top_k in (1, 4):
                for prompt in PROMPTS:
                    ids = complete(model, tokenizer.encode(prompt).ids, end, top_k, rng)
                    print(f"--- top_k {top_k}\n{tokenizer.decode(ids)}", file=sys.stderr)

    shared = Shared(options.threads, parameters)
    spawn = multiprocessing.get_context("spawn")
    helpers = [
        spawn.Process(target=train, args=(r, job, shared), daemon=True)
        for r in range(1, options.threads)
    ]
    for helper in helpers:
        helper.start()
    train(0, job, shared, save)
    for helper in helpers:
        helper.join()


if __name__ == "__main__":
    main()
