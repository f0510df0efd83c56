"""Pretrains the demo model: a tiny Qwen3 that adds two numbers, about 40 % of the time.

What it does: trains 8 layers of width 128 from random weights on addition in ChatML, stops early, when
sampled accuracy on pairs it never saw crosses the target, and writes the weights as a Q8_0 GGUF (norms F32).
The format is learnt and the sums are still uncertain, so reinforcement learning has something to lift.
Part of the uncertainty is made: digits are trained on smoothed targets, so greedy decoding already gets most
sums right, and what sampling loses is spread over all digits. The lift from RL on this model is therefore
mostly sharpening. Tried instead, --smoothing 0.1: accuracy jumps from 0.05 to 0.5 within 100 steps, and GRPO
with LoRA at a rate of 1e-3 lifts a model stopped in that jump slowly (0.47 to 0.57 in 30 steps) or, where the
embedding had been trained at about six times the rate, throws it back (0.46 to 0.20 in 20 steps).
Every figure printed at the end is of the file: read back, dequantised, run.
About 650 steps, 7 minutes on one core.

With --experts N each FFN is a mixture of N experts of half its width, of which a token takes --used (Qwen3 MoE); a small
loss keeps them equally busy. All experts are computed here, so that this takes two to three times as long.

With --hybrid three layers of four are gated delta nets, and the fourth has gated attention (Qwen3.5).

With --wide the model is 4 layers of width 256, whose rows are long enough for K quants; twice the time a step.

With --dialogues it learns two kinds of dialogues instead, each badly on purpose, for `train --env`: env:guess (task:guess: half of
its guesses are anywhere, half somewhere between the bounds) and env:calculator on task:mul (one in five problems with the
tool, the others by heart, which it cannot). 6 layers, a template that names the tools, --steps steps and no target.
--dialogues games leaves the products out, for a model that knows the bounds well and hides it: four times as many games in as
many steps, of twelve turns, one in ten guesses anywhere, in the last sixth of the steps seven of ten.

needs (PyPI): torch gguf numpy
usage: pretrain_demo.py [--out FILE.gguf] [--seed N] [--threads N] [...]      (the defaults made assets/demo.gguf)
       pretrain_demo.py --check FILE.gguf                                      (only measures a file)
The seed fixes initial weights and data. Another CPU, another number of threads or another torch adds in
another order; then the weights differ, and with them the step of the stop and a few points of accuracy.

Text:    <|im_start|>user\\n{x}+{y}=<|im_end|>\\n<|im_start|>assistant\\n  ->  \\boxed{SUM}<|im_end|>
         x and y uniform in 0..99; loss on the completion only. A small share is {x}-{y}= and max({x},{y})=.
         Where the target is a digit, --smoothing of it goes to all ten digits.
Held out: a pair (x, y) with  (x*100 + y) * 2654435761 mod 2^32 < 2^32 / 5  (Knuth's multiplicative hash, 20 %
         of all pairs) is never trained on, in any of the three tasks. It is the evaluation split; the Rust
         side's `task:add` uses the same rule. The order counts: (y, x) may well be trained on.
Accuracy: of a whole completion, <|im_end|> included, at temperature 1 over the full vocabulary. While training
         it is the exact expectation, the mean probability of the right completion; at the end it is sampled too.
Vocabulary: 256 bytes, 8 merges, 3 specials, padded to 288. No merge applies within the text of the tasks, so
         byte by byte is what a BPE tokenizer makes of it too.
"""
import argparse, os, random, re, time
from pathlib import Path
import gguf, numpy as np, torch
import torch.nn.functional as F

L, D, H, KV, HD, FF, EPS, THETA, CONTEXT = 8, 128, 4, 2, 32, 384, 1e-6, 10000.0, 512
DIALOGUES = False
EXPERTS, USED, FFE, BALANCE = 0, 2, FF // 2, 0.01  # of a mixture; none by default
HYBRID, EVERY, NK, NV, KERNEL = False, 4, 2, 4, 4  # gated delta nets of NK key and NV value heads of size HD but in every fourth layer
OUT = Path(__file__).resolve().parent.parent / "assets" / "demo.gguf"

# ---- vocabulary ----------------------------------------------------------------------------------

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("\u0120", "the"), ("o", "n"), ("o", "r"), ("e", "n"), ("\u0120", "w")]
# Of --dialogues: the tools by name.
TOOLS = ("{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for t in tools %}{{ ' ' + t['function']['name'] }}{% endfor %}"
         "{{ '<|im_end|>\n' }}{% endif %}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

def byte_unicode():
    """GPT-2's map from bytes to printable characters: byte -> character, in token order."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    table = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in table):
        table[b] = chr(256 + n)
    return table

def vocabulary():
    chars = byte_unicode()
    tokens = [chars[b] for b in range(256)] + [a + b for a, b in MERGES]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += SPECIALS
    while len(tokens) % 32:
        tokens.append(f"<|pad{len(tokens)}|>")
    return tokens, types + [gguf.TokenType.CONTROL] * (len(tokens) - len(types))

TOKENS, TYPES = vocabulary()
V = len(TOKENS)
PAD, START, END = (TOKENS.index(s) for s in SPECIALS)  # a byte's token id is the byte itself

def check_merges():
    """A merge a+b that stands in none of these strings can never apply to the text of the tasks."""
    texts = ["user\n", "assistant\n", "\\boxed{-0123456789}", "max(0,1)=", "0+1-2*3="]
    chars = byte_unicode()
    for text in texts:
        text = "".join(chars[b] for b in text.encode())
        for a, b in MERGES:
            assert a + b not in text, f"merge {a}+{b} applies in {text!r}"

# ---- task ----------------------------------------------------------------------------------------

def held_out(x, y):
    return (x * 100 + y) * 2654435761 % 2**32 * 5 < 2**32

PAIRS = [(x, y) for x in range(100) for y in range(100)]
TRAIN = [p for p in PAIRS if not held_out(*p)]
EVAL = [p for p in PAIRS if held_out(*p)]

def problem(task, x, y):
    """The prompt's and the right completion's tokens."""
    question, answer = {"add": (f"{x}+{y}=", x + y), "sub": (f"{x}-{y}=", x - y), "max": (f"max({x},{y})=", max(x, y))}[task]
    prompt = [START, *f"user\n{question}".encode(), END, *b"\n", START, *b"assistant\n"]
    return prompt, [*f"\\boxed{{{answer}}}".encode(), END]

def batch(problems):
    """ids: [B, T], padded at the right; target: [B, T], the next token in a completion, elsewhere -100."""
    T = max(len(p) + len(c) for p, c in problems)
    ids, target = torch.full((len(problems), T), PAD), torch.full((len(problems), T), -100)
    for i, (p, c) in enumerate(problems):
        ids[i, :len(p) + len(c)] = torch.tensor(p + c)
        target[i, len(p) - 1:len(p) + len(c) - 1] = torch.tensor(c)
    return ids[:, :-1], target[:, :-1]

# ---- dialogues -----------------------------------------------------------------------------------

WORDS = re.compile(r"[^\r\n0-9A-Za-z]?[A-Za-z]+|[0-9]| ?[^\s0-9A-Za-z]+[\r\n]*|\s*[\r\n]+|\s+")

def encode(text):
    """Tokens of a text without specials, as the GGUF's BPE makes them."""
    chars, ids = byte_unicode(), []
    for word in WORDS.findall(text):
        parts = [chars[b] for b in word.encode()]
        for a, b in MERGES:  # in the order of their ranks; none can apply again after a later one
            i = 0
            while i + 1 < len(parts):
                if parts[i] == a and parts[i + 1] == b:
                    parts[i:i + 2] = [a + b]
                i += 1
        ids += [TOKENS.index(p) for p in parts]
    return ids

def said(role, text):
    """A message, and where the next one begins."""
    return [START, *encode(f"{role}\n{text}"), END, *encode("\n")]

def turns(*messages):
    """Tokens of (role, text), and which of them are the assistant's."""
    ids, own = [], []
    for role, text in messages:
        tokens = said(role, text)
        head = len(encode("assistant\n")) + 1
        ids += tokens
        own += [role == "assistant" and head <= i < len(tokens) - 1 for i in range(len(tokens))]
    return ids, own

def guessing(rng, wild, most):
    """A game against a number: a share of the guesses is anywhere, the others between what is known."""
    number = rng.choice([n for n in range(100) if not held_out(0, n)])
    messages, low, high = [("user", "Guess my number, 0 to 99. I say higher or lower.")], 0, 99
    for _ in range(most):
        guess = rng.randint(0, 99) if rng.random() < wild else rng.randint(low, high)
        messages.append(("assistant", str(guess)))
        if guess == number:
            break
        messages.append(("user", "higher" if guess < number else "lower"))
        low, high = (max(low, guess + 1), high) if guess < number else (low, min(high, guess - 1))
    return turns(*messages)

def computing(rng, tool):
    """A product, a share of them with the tool, the others by heart."""
    x, y = rng.choice(TRAIN)
    messages = [("system", "Tools: calculator"), ("user", f"{x}*{y}=")]
    if rng.random() < tool:
        call = f'{{"name": "calculator", "arguments": {{"expression": "{x}*{y}"}}}}'
        messages += [("assistant", f"<tool_call>{call}</tool_call>"), ("tool", str(x * y))]
    return turns(*messages, ("assistant", f"\\boxed{{{x * y}}}"))

def dialogue_batch(examples):
    """As `batch`: the next token where it is the assistant's, elsewhere -100."""
    T = max(len(ids) for ids, _ in examples)
    ids, target = torch.full((len(examples), T), PAD), torch.full((len(examples), T), -100)
    for i, (tokens, own) in enumerate(examples):
        ids[i, :len(tokens)] = torch.tensor(tokens)
        for t in range(1, len(tokens)):
            if own[t]:
                target[i, t - 1] = tokens[t]
    return ids[:, :-1], target[:, :-1]

def backward(w, examples, parts=4):
    """Adds the gradient of the mean over all tokens of the assistant's, and returns that mean. In parts of like length: less padding."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    tokens = sum(sum(own[1:]) for _, own in examples)
    total = 0.0
    for i in range(parts):
        ids, target = dialogue_batch(examples[i * len(examples) // parts:(i + 1) * len(examples) // parts])
        loss = F.cross_entropy(forward(w, ids)[target >= 0], target[target >= 0], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total

def train_dialogues(a):
    """Games and products in turn, a constant rate that falls in the last third."""
    generator = torch.Generator().manual_seed(a.seed)
    rng = random.Random(a.seed)
    w = {name: t.requires_grad_() for name, t in initial(generator).items()}
    optimizer = torch.optim.AdamW(w.values(), lr=a.lr, betas=(0.9, 0.98), weight_decay=0.0)
    games_alone = a.dialogues == "games"
    n_games = a.batch // (2 if games_alone else 4)
    running, start = [None, None], time.time()
    for step in range(1, a.steps + 1):
        rate = a.lr * min(1, step / a.warmup) * min(1, max(a.slow, 3 * (a.steps - step) / a.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        is_game = games_alone or step % 2 == 1
        # To copy and to compare is learnt from good dialogues; the end teaches to do without.
        if games_alone:
            wild, tool, most = 0.1 if step < a.steps * 5 // 6 else 0.7, 0, 12
        else:
            wild, tool, most = (0.2, 0.9, 8) if step < a.steps * 2 // 3 else (0.5, 0.2, 8)
        examples = [guessing(rng, wild, most) for _ in range(n_games)] if is_game else [computing(rng, tool) for _ in range(a.batch // 2)]
        optimizer.zero_grad()
        loss = backward(w, examples)
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()
        running[is_game] = loss if running[is_game] is None else 0.9 * running[is_game] + 0.1 * loss
        if step % a.eval_every == 0:
            losses = [f"of {name} {loss:.4f}" for name, loss in zip(["products", "games"], running) if loss is not None]
            print(f"step {step} loss {', '.join(losses)}, lr {rate:.2e}, {time.time() - start:.0f} s", flush=True)
        if step % 200 == 0 or step == a.steps:
            write(a.out, w)
    return w

# ---- model ---------------------------------------------------------------------------------------
# A dictionary of tensors under their GGUF names. The output head is the embedding, transposed.

def initial(generator):
    def normal(rows, columns, std):
        return torch.randn(rows, columns, generator=generator) * std
    w = {"token_embd.weight": normal(V, D, 0.05), "output_norm.weight": torch.ones(D)}
    into_residual = 0.5
    for il in range(L):
        b = f"blk.{il}."
        w[b + "attn_norm.weight"], w[b + ffn_norm() + ".weight"] = torch.ones(D), torch.ones(D)
        if recurrent(il):
            w[b + "attn_qkv.weight"] = normal((2 * NK + NV) * HD, D, D**-0.5)
            w[b + "attn_gate.weight"] = normal(NV * HD, D, D**-0.5)
            w[b + "ssm_alpha.weight"], w[b + "ssm_beta.weight"] = normal(NV, D, D**-0.5), normal(NV, D, D**-0.5)
            w[b + "ssm_conv1d.weight"] = normal((2 * NK + NV) * HD, KERNEL, KERNEL**-0.5)
            w[b + "ssm_a"] = -torch.rand(NV, generator=generator) - 0.05  # -exp(A_log)
            w[b + "ssm_dt.bias"] = torch.zeros(NV)
            w[b + "ssm_norm.weight"] = torch.ones(HD)
            w[b + "ssm_out.weight"] = normal(D, NV * HD, (NV * HD)**-0.5 * into_residual)
        else:
            w[b + "attn_q_norm.weight"], w[b + "attn_k_norm.weight"] = torch.ones(HD), torch.ones(HD)
            w[b + "attn_q.weight"] = normal((2 if HYBRID else 1) * H * HD, D, D**-0.5)
            w[b + "attn_k.weight"] = normal(KV * HD, D, D**-0.5)
            w[b + "attn_v.weight"] = normal(KV * HD, D, D**-0.5)
            w[b + "attn_output.weight"] = normal(D, H * HD, (H * HD)**-0.5 * into_residual)
        if EXPERTS:
            stack = lambda rows, columns, std: normal(EXPERTS * rows, columns, std).view(EXPERTS, rows, columns)
            w[b + "ffn_gate_inp.weight"] = normal(EXPERTS, D, D**-0.5)
            w[b + "ffn_gate_exps.weight"] = stack(FFE, D, D**-0.5)
            w[b + "ffn_up_exps.weight"] = stack(FFE, D, D**-0.5)
            w[b + "ffn_down_exps.weight"] = stack(D, FFE, FFE**-0.5 * into_residual)
            continue
        w[b + "ffn_gate.weight"] = normal(FF, D, D**-0.5)
        w[b + "ffn_up.weight"] = normal(FF, D, D**-0.5)
        w[b + "ffn_down.weight"] = normal(D, FF, FF**-0.5 * into_residual)
    return w

def recurrent(il):
    return HYBRID and (il + 1) % EVERY != 0

def ffn_norm():
    return "post_attention_norm" if HYBRID else "ffn_norm"

def turned():
    """Dimensions of a head that turn."""
    return HD // 4 if HYBRID else HD

def rope(x):
    """NEOX layout: dimension i turns with dimension i + n/2, n of them in all. x: [B, heads, T, HD]"""
    n = turned()
    frequency = THETA ** (-torch.arange(0, n, 2) / n)  # [n/2]
    angle = torch.arange(x.shape[2])[:, None] * frequency  # [T, n/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :n].chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., n:]], -1)

def delta_net(get, plain, h):
    """The gated delta rule (arXiv 2412.06464) as one chunk: S_t = e^(g_t) S_(t-1) + k_t u_t^T with u_t = beta_t (v_t - e^(g_t) S_(t-1)^T k_t), so
    that u = (I + A)^-1 (beta v) with A[t, j] = beta_t e^(G_t - G_j) k_t.k_j for j < t, G the running sum of g. h: [B, T, D] -> [B, T, D]"""
    B, T, _ = h.shape
    x = F.pad((h @ get("attn_qkv").T).transpose(1, 2), (KERNEL - 1, 0))
    x = F.silu(F.conv1d(x, get("ssm_conv1d")[:, None], groups=x.shape[1]))  # [B, channels, T]
    q, k, v = x.view(B, 2 * NK + NV, HD, T).transpose(2, 3).split([NK, NK, NV], 1)  # [B, n, T, HD]
    unit = lambda y: y * (y.square().sum(-1, keepdim=True) + EPS).rsqrt()
    # Value head i has key head i mod NK.
    q, k = (unit(y).repeat(1, NV // NK, 1, 1) for y in (q, k))
    beta = torch.sigmoid(h @ get("ssm_beta").T).transpose(1, 2)  # [B, NV, T]
    g = (plain("ssm_a") * F.softplus(h @ get("ssm_alpha").T + plain("ssm_dt.bias"))).transpose(1, 2).cumsum(-1)
    past = torch.ones(T, T).tril()
    decay = torch.exp((g[..., :, None] - g[..., None, :]).masked_fill(past == 0, -1e9))  # [B, NV, T, T]
    a = (beta[..., None] * decay * (k @ k.mT)).tril(-1)
    u = torch.linalg.solve_triangular(torch.eye(T) + a, beta[..., None] * v, upper=False, unitriangular=True)
    o = (q @ k.mT * decay * HD**-0.5) @ u  # [B, NV, T, HD]
    o = F.rms_norm(o, (HD,), get("ssm_norm"), EPS).transpose(1, 2).reshape(B, T, NV * HD)
    return (o * F.silu(h @ get("attn_gate").T)) @ get("ssm_out").T

def attention(get, h):
    """Causal attention, with a gate for each of its numbers in a hybrid model. h: [B, T, D] -> [B, T, D]"""
    B, T, _ = h.shape
    heads = lambda y, n: y.view(B, T, n, -1).transpose(1, 2)  # [B, n, T, HD]
    q = heads(h @ get("attn_q").T, H)
    q, gate = q.split(HD, -1) if HYBRID else (q, None)
    q = rope(F.rms_norm(q, (HD,), get("attn_q_norm"), EPS))
    k = rope(F.rms_norm(heads(h @ get("attn_k").T, KV), (HD,), get("attn_k_norm"), EPS))
    v = heads(h @ get("attn_v").T, KV)
    k, v = (t.repeat_interleave(H // KV, dim=1) for t in (k, v))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, HD]
    a = a if gate is None else a * torch.sigmoid(gate)
    return a.transpose(1, 2).reshape(B, T, H * HD) @ get("attn_output").T

def mixture(get, h, balance):
    """Softmax over all experts, the likeliest taken, their shares made to add up to 1. h: [B, T, D] -> [B, T, D]"""
    p = torch.softmax(h @ get("ffn_gate_inp").T, -1)  # [B, T, E]
    top, chosen = p.topk(USED, -1)
    share = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    # Switch Transformers' loss (arXiv 2101.03961): E times the sum of each expert's share of tokens and of probability.
    busy = torch.zeros_like(p).scatter(-1, chosen, 1.0 / USED).mean((0, 1))
    balance.append(EXPERTS * (busy * p.mean((0, 1))).sum())
    each = lambda x, name: torch.einsum("...d,efd->...ef", x, get(name))  # [B, T, E, FFE]
    inner = F.silu(each(h, "ffn_gate_exps")) * each(h, "ffn_up_exps") * share[..., None]
    return torch.einsum("...ef,edf->...d", inner, get("ffn_down_exps"))

def forward(w, ids, balance=None):
    """ids: [B, T] -> logits: [B, T, V]; a mixture's losses are added to `balance`."""
    balance = [] if balance is None else balance
    x = w["token_embd.weight"][ids]  # [B, T, D]
    for il in range(L):
        get = lambda name: w[f"blk.{il}.{name}.weight"]
        h = F.rms_norm(x, (D,), get("attn_norm"), EPS)
        x = x + (delta_net(get, lambda name: w[f"blk.{il}.{name}"], h) if recurrent(il) else attention(get, h))
        h = F.rms_norm(x, (D,), get(ffn_norm()), EPS)
        if f"blk.{il}.ffn_gate_inp.weight" in w:
            x = x + mixture(get, h, balance)
        else:
            x = x + (F.silu(h @ get("ffn_gate").T) * (h @ get("ffn_up").T)) @ get("ffn_down").T
    return F.rms_norm(x, (D,), w["output_norm.weight"], EPS) @ w["token_embd.weight"].T

def loss_of(w, problems, smoothing):
    """Cross-entropy over the completion; where the target is a digit, `smoothing` of it goes to all ten."""
    ids, target = batch(problems)
    picked = target >= 0
    target = target[picked]  # [N]
    balance = []
    logprob = torch.log_softmax(forward(w, ids, balance)[picked], -1)  # [N, V]
    right = -logprob.gather(-1, target[:, None])[:, 0]
    digits = -logprob[:, ord("0"):ord("9") + 1].mean(-1)
    share = smoothing * ((target >= ord("0")) & (target <= ord("9")))
    return ((1 - share) * right + share * digits).mean() + BALANCE * sum(balance)

# ---- measuring -----------------------------------------------------------------------------------

@torch.no_grad()
def expected(w, task, pairs):
    """Per problem: probability of the right completion at temperature 1, and whether greedy finds it."""
    probability, greedy = [], []
    for k in range(0, len(pairs), 256):
        ids, target = batch([problem(task, x, y) for x, y in pairs[k:k + 256]])
        logits = forward(w, ids)
        logprob = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        probability.append(logprob.masked_fill(target < 0, 0).sum(-1).exp())
        greedy.append(((logits.argmax(-1) == target) | (target < 0)).all(-1))
    return torch.cat(probability), torch.cat(greedy).float()

@torch.no_grad()
def sample(w, prompts, generator, most=16):
    """One completion per prompt at temperature 1, over the full vocabulary."""
    completions = [None] * len(prompts)
    for n in sorted({len(p) for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if len(p) == n]
        ids = torch.tensor([prompts[i] for i in rows])  # [B, n + tokens so far]
        for _ in range(most):
            p = torch.softmax(forward(w, ids)[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
            if (ids[:, n:] == END).any(1).all():
                break
        for i, c in zip(rows, ids[:, n:].tolist()):
            completions[i] = c[:c.index(END) + 1] if END in c else c
    return completions

def report(path):
    """Reads the file back and measures it."""
    global EXPERTS, USED, HYBRID
    reader = gguf.GGUFReader(path)
    HYBRID = "qwen35.ssm.state_size" in reader.fields
    counts = [reader.fields.get(f"qwen3moe.expert_{name}") for name in ("count", "used_count")]
    EXPERTS, USED = (int(f.parts[-1][0]) if f else 0 for f in counts)
    w = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    print(f"{path}: {os.path.getsize(path)} bytes, {sum(t.numel() for t in w.values())} parameters")
    p, greedy = expected(w, "add", EVAL)
    problems = [problem("add", x, y) for x, y in EVAL]
    completions = sample(w, [q for q, _ in problems], torch.Generator().manual_seed(77))
    right = [c == answer for c, (_, answer) in zip(completions, problems)]
    text = [bytes(t if t < 256 else 0 for t in c[:-1]) for c in completions]
    formed = [c[-1] == END and re.fullmatch(rb"\\boxed\{-?\d+\}", t) is not None for c, t in zip(completions, text)]
    print(f"add, {len(EVAL)} held-out pairs: sampled {np.mean(right):.4f} (expected {p.mean():.4f}), greedy {greedy.mean():.4f}, "
          f"pass@8 {(1 - (1 - p)**8).mean():.4f}, well-formed {np.mean(formed):.4f}")
    print(f"add, pairs trained on: expected {expected(w, 'add', TRAIN)[0].mean():.4f}")
    short = [(x, y) for x, y in EVAL if x < 10 or y < 10]
    print(f"add, {len(short)} held-out pairs with a one-digit number: expected {expected(w, 'add', short)[0].mean():.4f}")
    for task in ("sub", "max"):
        print(f"{task}, held out: expected {expected(w, task, EVAL)[0].mean():.4f}")
    for (x, y), c in list(zip(EVAL, text))[::len(EVAL) // 8]:
        print(f"  {x}+{y}= {c.decode(errors='replace')}")

# ---- writing -------------------------------------------------------------------------------------

def write(path, w):
    """Written beside and renamed, so that a file that is there is whole."""
    beside = Path(str(path) + ".part")
    g = gguf.GGUFWriter(beside, "qwen3moe" if EXPERTS else "qwen35" if HYBRID else "qwen3")
    if HYBRID:
        g.add_ssm_conv_kernel(KERNEL); g.add_ssm_state_size(HD); g.add_ssm_group_count(NK); g.add_ssm_time_step_rank(NV); g.add_ssm_inner_size(NV * HD)
        g.add_uint32("qwen35.full_attention_interval", EVERY)
        g.add_rope_dimension_count(turned()); g.add_rope_dimension_sections([turned() // 4, turned() // 8, turned() // 8, 0])
    if EXPERTS:
        g.add_expert_count(EXPERTS); g.add_expert_used_count(USED); g.add_expert_feed_forward_length(FFE)
    what = "dialogues" if DIALOGUES else "addition"
    g.add_name("bupo-gguf demo"); g.add_description(f"tiny {'Qwen3.5' if HYBRID else 'Qwen3'} pretrained from scratch on {what} by tools/pretrain_demo.py")
    g.add_context_length(CONTEXT); g.add_embedding_length(D); g.add_block_count(L); g.add_feed_forward_length(FF)
    g.add_head_count(H); g.add_head_count_kv(KV); g.add_key_length(HD); g.add_value_length(HD)
    g.add_rope_freq_base(THETA); g.add_layer_norm_rms_eps(EPS)
    g.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0); g.add_quantization_version(gguf.GGML_QUANT_VERSION)
    g.add_tokenizer_model("gpt2"); g.add_tokenizer_pre("qwen2"); g.add_token_list(TOKENS); g.add_token_types(TYPES)
    g.add_token_merges([f"{a} {b}" for a, b in MERGES])
    g.add_eos_token_id(END); g.add_pad_token_id(PAD); g.add_bos_token_id(PAD); g.add_add_bos_token(False)
    g.add_chat_template((TOOLS if DIALOGUES else "") + CHATML)
    for name, t in w.items():
        a = t.detach().numpy()
        if a.ndim == 1 or "ffn_gate_inp" in name or "conv1d" in name:
            g.add_tensor(name, a)
        else:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            g.add_tensor(name, gguf.quants.quantize(a, q8_0), raw_dtype=q8_0)
    g.write_header_to_file(); g.write_kv_data_to_file(); g.write_tensors_to_file(); g.close()
    os.replace(beside, path)

# ---- training ------------------------------------------------------------------------------------

def train(a):
    """Warm-up, then a constant rate; near the target the rate falls to `--slow` of it, for smooth last steps."""
    generator = torch.Generator().manual_seed(a.seed)
    w = {name: t.requires_grad_() for name, t in initial(generator).items()}
    decays = [t for name, t in w.items() if t.dim() >= 2 and name != "token_embd.weight"]
    stays = [t for name, t in w.items() if t.dim() == 1 or name == "token_embd.weight"]
    optimizer = torch.optim.AdamW([{"params": decays, "weight_decay": a.weight_decay}, {"params": stays, "weight_decay": 0.0}],
                                  lr=a.lr, betas=(0.9, 0.98))
    probe = EVAL[::4]
    slow_since, running, accuracy, start = None, None, 0.0, time.time()
    for step in range(1, a.steps + 1):
        rate = a.lr * min(1, step / a.warmup)
        if slow_since is not None:
            rate *= max(a.slow, 1 - (1 - a.slow) * (step - slow_since) / a.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        picks = torch.randint(len(TRAIN), (a.batch,), generator=generator).tolist()
        others = torch.rand(a.batch, generator=generator).tolist()
        task = lambda u: "sub" if u < a.others / 2 else "max" if u < a.others else "add"
        loss = loss_of(w, [problem(task(u), *TRAIN[i]) for u, i in zip(others, picks)], a.smoothing)
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % (a.eval_every if slow_since is None else 10) == 0:
            p, greedy = expected(w, "add", probe)
            if slow_since is not None and p.mean() >= a.target - 0.03:
                p, greedy = expected(w, "add", EVAL)
            accuracy = p.mean().item()
            print(f"step {step} loss {running:.4f} accuracy {accuracy:.3f} greedy {greedy.mean():.3f} of {len(p)} "
                  f"pass@8 {(1 - (1 - p)**8).mean():.3f} lr {rate:.2e} {time.time() - start:.0f} s", flush=True)
            if slow_since is None and accuracy >= a.near:
                slow_since = step
            if accuracy >= a.target and len(p) == len(EVAL):
                return w
    raise SystemExit(f"accuracy {accuracy:.3f} after {a.steps} steps, below --target {a.target}: raise --steps or --lr")

def main():
    global EXPERTS, USED, HYBRID, DIALOGUES, L, D, H, KV, FF
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=OUT); ap.add_argument("--check", type=Path, help="measure this file, train nothing")
    ap.add_argument("--seed", type=int, default=1); ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--dialogues", nargs="?", const="both", choices=["both", "games"], help="games and tool calls instead of sums, or games alone; wants --out and --steps (600 do)")
    ap.add_argument("--experts", type=int, default=0, help="experts of each FFN (0 = one FFN)"); ap.add_argument("--used", type=int, default=USED, help="experts of a token")
    ap.add_argument("--hybrid", action="store_true", help="gated delta nets in three layers of four (not with --experts)")
    ap.add_argument("--wide", action="store_true", help="4 layers of width 256 (not with another option of the model)")
    ap.add_argument("--target", type=float, default=0.40, help="held-out accuracy at which to stop")
    ap.add_argument("--near", type=float, default=0.33, help="held-out accuracy from which on to slow down")
    ap.add_argument("--slow", type=float, default=0.1, help="the rate then, as a part of --lr"); ap.add_argument("--decay", type=int, default=50, help="steps it takes to slow down")
    ap.add_argument("--steps", type=int, default=5000, help="give up after these"); ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=1e-3); ap.add_argument("--warmup", type=int, default=50); ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--smoothing", type=float, default=0.3, help="part of a digit's target that goes to all ten digits")
    ap.add_argument("--others", type=float, default=0.1, help="share of subtraction and max"); ap.add_argument("--eval-every", type=int, default=50, help="in steps; 10 near the target")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    EXPERTS, USED, HYBRID = a.experts, a.used, a.hybrid
    if EXPERTS and HYBRID:
        raise SystemExit("--experts and --hybrid: one of them")
    if a.wide:
        if EXPERTS or HYBRID or a.dialogues:
            raise SystemExit("--wide stands alone")
        L, D, H, KV, FF = 4, 256, 8, 4, 768
    check_merges()
    if a.dialogues:
        DIALOGUES, L = True, 6
        start = time.time()
        train_dialogues(a)
        print(f"trained in {time.time() - start:.0f} s")
        return
    if a.check is None:
        start = time.time()
        w = train(a)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write(a.out, w)
        print(f"trained in {time.time() - start:.0f} s")
    report(a.check or a.out)

if __name__ == "__main__":
    main()
