"""The slow, independent reference: one sequence, one token at a time, every equation spelt out.

It shares nothing with the library but the parameters: its own rotary embedding, RMS norm, attention over a Python
dict of kept tokens, DeltaW = A S B built as a matrix, states as a list. Gradients follow the named modes by
detaching: `chain` detaches keys and values at the start of every stretch, `horizon` also cuts the chain of states.
Scores of evicted tokens are Python sums over every probability that every head gave to every token, and over keys.
"""

from __future__ import annotations

import math

import torch

from pte.method.eviction.policy import KeptTokens

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def angles(config, position, dtype):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (torch.tensor(float(position)) * frequencies).to(torch.float32)
    return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)


def rotate(x, config, position):
    """(heads, head_dim) rotated: pairs (i, i + head_dim / 2)."""
    cos, sin = angles(config, position, x.dtype)
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def unit(state, rank):
    """Frobenius norm sqrt(rank)."""
    norm = torch.sqrt((state * state).sum())
    return state if norm == 0 else state * (rank**0.5 / norm)


class Reference:
    """Teacher-forced log-probs of a completion under the bounded policy."""

    def __init__(self, policy, *, gradient_mode="exact", horizon=None, temperature=1.0, stream_seed=0, evicted=None):
        self.followed = evicted  # reasoning tokens of each eviction, given instead of chosen
        self.left = []  # and those that left
        # Kept reasoning index -> list of (index of the query, probability, keys it attended to), over layers and heads.
        self.received = {}
        self.policy, self.base, self.adapter = policy, policy.base, policy.adapter
        self.config = policy.base.config
        self.mode, self.horizon, self.temperature, self.stream_seed = gradient_mode, horizon, temperature, stream_seed
        self.layers = policy.base.get_decoder().layers

    def weight(self, layer, name):
        block = layer.self_attn if name in LINEARS[:4] else layer.mlp
        linear = getattr(block, name)
        return getattr(linear, "base", linear)

    def apply(self, index, name, x, read):
        """(W + scale A S B) x + b, with the matrix built."""
        linear = self.weight(self.layers[index], name)
        matrix = self.matrix(linear)
        frozen = matrix @ self.entering(x)
        if self.adapter is not None and name in self.adapter.targets_of(index):
            pair = self.adapter.layers[index][name]
            state = torch.eye(self.adapter.rank, dtype=x.dtype) if read is None else read
            frozen = frozen + self.adapter.scale * (pair.up.to(x.dtype) @ state @ pair.down.to(x.dtype)) @ x
        return frozen if linear.bias is None else frozen + linear.bias

    def matrix(self, linear):
        """The frozen weights of a map."""
        return linear.weight

    def entering(self, x):
        """What a frozen map multiplies with."""
        return x

    def stored(self, rotated, before, value, position):
        """What is kept of a token: its rotated key, by heads, the same key before the rotation, and its value."""
        return rotated, before, value

    def keys_of(self, index, raw):
        """Per head, with the key norm of Qwen3 where the layer has one; before the rotation."""
        attention = self.layers[index].self_attn
        heads = raw.view(-1, attention.head_dim)
        if hasattr(attention, "k_norm"):
            heads = rms_norm(heads, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        return heads

    def encode(self, index, tokens):
        """S' as a sum of outer products over tokens (key, value)."""
        rank = self.adapter.rank
        total = torch.zeros(rank, rank, dtype=self.adapter.encoder.key_map.dtype)
        for token in tokens:
            address, content = self.written(index, token)
            total = total + torch.outer(content, address)
        return total

    def fold(self, state, index, tokens):
        if self.adapter.update_rule == "delta":
            for token in tokens:
                address, content = self.written(index, token)
                state = state + torch.outer(content - state @ address, address) / (1 + address @ address)
            return state
        total = state + self.encode(index, tokens)
        return unit(total, self.adapter.rank) if self.adapter.update_rule == "paper" else total

    def written(self, index, token):
        """Address and content of one token (key, value)."""
        encoder = self.adapter.encoder
        queries = encoder.query_map[index] @ encoder.query[index].T  # (rank, queries)
        key, value = (x.to(queries.dtype) for x in token)
        return queries.T @ (encoder.key_map[index] @ key), encoder.value_map[index] @ value

    def read(self, state):
        if state is None:
            return None
        return state if self.adapter.update_rule == "paper" else unit(state, self.adapter.rank)

    def first_state(self, index):
        if self.adapter is None or self.adapter.encoder is None:
            return None
        tokens = []
        for token in self.adapter.encoder.global_tokens.to(self.base.dtype):
            key_map, value_map = self.weight(self.layers[index], "k_proj"), self.weight(self.layers[index], "v_proj")
            given = self.entering(token)
            key = self.matrix(key_map) @ given + (0 if key_map.bias is None else key_map.bias)
            value = self.matrix(value_map) @ given + (0 if value_map.bias is None else value_map.bias)
            tokens.append((self.keys_of(index, key).reshape(-1), value))
        rank, dtype = self.adapter.rank, self.adapter.encoder.key_map.dtype
        return self.fold(torch.zeros(rank, rank, dtype=dtype), index, tokens)

    def logprobs(self, prompt, completion, *, dtype=torch.float64):
        """Log-prob of every completion token, a differentiable vector."""
        schedule = self.policy.schedule
        count = len(self.layers)
        prompt_cache = [[] for _ in range(count)]  # (key, value)
        window = [{} for _ in range(count)]  # reasoning index -> (rotated key, key before rotation, value)
        chain = [[self.first_state(index)] for index in range(count)]  # states after 0, 1, ... evictions
        blocks = [[] for _ in range(count)]
        results = []
        stretch_starts = self.stretch_starts(len(completion) - 1)
        evictions = 0
        for step in range(len(prompt) + len(completion) - 1):
            token_index = step - len(prompt)
            token = prompt[step] if token_index < 0 else completion[token_index]
            if token_index > 0 and token_index in stretch_starts and self.mode != "exact":
                for index in range(count):
                    prompt_cache[index] = [(k.detach(), v.detach()) for k, v in prompt_cache[index]]
                    window[index] = {n: tuple(x.detach() for x in kept) for n, kept in window[index].items()}
            if token_index >= 0 and schedule.evicts_at(token_index):
                self.evict(window, chain, blocks, evictions)
                evictions += 1
            hidden = self.base.get_decoder().embed_tokens.weight[token].to(dtype)
            for index in range(count):
                read = self.read(self.state_for_reading(chain[index], blocks[index], index))
                hidden = self.layer(index, hidden, step, token_index, read, prompt_cache[index], window[index])
            norm = self.base.get_decoder().norm
            final = rms_norm(hidden, norm.weight, norm.variance_epsilon)
            if token_index >= -1:
                logits = self.base.get_output_embeddings().weight @ final / self.temperature
                results.append(torch.log_softmax(logits, -1)[completion[token_index + 1]])
        return torch.stack(results)

    def stretch_starts(self, entered):
        schedule = self.policy.schedule
        if schedule.is_full:
            return set()
        width = self.policy.segments_per_stretch * schedule.evict_tokens
        return set(range(schedule.window_tokens, entered, width))

    def state_for_reading(self, chain, blocks, index):
        """The newest state; in `horizon` mode rebuilt so that gradients reach the last evictions only."""
        if self.mode != "horizon" or chain[0] is None or not blocks:
            return chain[-1]
        reach = min(self.horizon, len(blocks))
        start = chain[len(blocks) - reach]
        state = start if reach == len(blocks) else start.detach()
        for block in blocks[len(blocks) - reach :]:
            state = self.fold(state, index, block)
        return state

    def choose(self, window, evictions):
        """Reasoning tokens that leave."""
        schedule, policy = self.policy.schedule, self.policy.eviction
        kept = sorted(window[0])
        if self.followed is not None:
            return self.followed[evictions]
        scored = {
            "h2o": lambda: self.attention_totals(kept, 0),
            "scissorhands": lambda: self.low_counts(kept, evictions),
            "tova": lambda: self.attention_totals(kept, kept[-1]),
            "snapkv": lambda: self.pooled_votes(kept, policy.recent_tokens),
            "rkv": lambda: self.joint_scores(kept, window, evictions),
            "keydiff": lambda: self.distinctness(kept, window),
        }
        if policy.name in scored:
            scores = scored[policy.name]()
            candidates = kept[: len(kept) - policy.recent_tokens]
            return sorted(sorted(candidates, key=lambda n: (scores[n], n))[: schedule.evict_tokens])
        seen = KeptTokens(torch.tensor([kept]), torch.tensor([evictions]), torch.tensor([self.stream_seed]))
        return [kept[slot] for slot in policy.evicted_slots(seen, evict_tokens=schedule.evict_tokens)[0].tolist()]

    def attention_totals(self, kept, since):
        """What each token received from query `since` on. H2O: all while it was kept; TOVA: of the last query."""
        return {n: sum(p for query, p, _ in self.received[n] if query >= since) for n in kept}

    def last_eviction(self, evictions):
        """First query after the last eviction: the next happens before token W + evictions * E, that E before."""
        schedule = self.policy.schedule
        return schedule.window_tokens + (evictions - 1) * schedule.evict_tokens if evictions else 0

    def low_counts(self, kept, evictions):
        """Scissorhands: - times a token received less than 1 / keys since the last eviction."""
        since = self.last_eviction(evictions)
        return {n: -sum(p < 1 / keys for query, p, keys in self.received[n] if query >= since) for n in kept}

    def pooled_votes(self, kept, recent):
        """SnapKV: largest vote of the last queries for one of 7 neighbours outside the observation window."""
        votes, older = self.attention_totals(kept, kept[-recent]), kept[:-recent]
        return {n: max(votes[m] for m in older[max(0, i - 3) : i + 4]) for i, n in enumerate(older)}

    def distinctness(self, kept, window):
        """KeyDiff: - cosine of a key and the mean of the unit keys, over layers and heads."""
        heads, scores = self.policy.cache_shape.kv_heads, dict.fromkeys(kept, 0.0)
        for index in range(len(self.layers)):
            for head in range(heads):
                keys = {n: window[index][n][0].detach().view(heads, -1)[head] for n in kept}
                units = {n: key / (key @ key).sqrt() for n, key in keys.items()}
                mean = sum(units.values()) / len(kept)
                for n in kept:
                    scores[n] -= float(units[n] @ mean / (mean @ mean).sqrt())
        return scores

    def joint_scores(self, kept, window, evictions):
        """R-KV: 0.1 x share of attention since the last eviction - 0.9 x redundancy of the keys."""
        recent = self.attention_totals(kept, self.last_eviction(evictions))
        total = sum(recent.values())
        redundancy = dict.fromkeys(kept, 0.0)
        heads = self.policy.cache_shape.kv_heads
        for index in range(len(self.layers)):
            for head in range(heads):
                keys = {n: window[index][n][0].detach().view(heads, -1)[head] for n in kept}
                similar = {}
                for n in kept:
                    for m in kept:
                        cosine = keys[n] @ keys[m] / (keys[n] @ keys[n]).sqrt() / (keys[m] @ keys[m]).sqrt()
                        similar[n, m] = 0.0 if n == m else float(cosine)
                for n in kept:  # the newest of the tokens that are like n is not redundant because of n
                    like = [m for m in kept if similar[n, m] > 0.5]
                    if like:
                        similar[n, like[-1]] = 0.0
                means = {m: sum(similar[n, m] for n in kept) / len(kept) for m in kept}
                norm = sum(math.exp(mean) for mean in means.values())
                for m in kept:
                    redundancy[m] += math.exp(means[m]) / norm / (heads * len(self.layers))
        return {n: 0.1 * recent[n] / total - 0.9 * redundancy[n] for n in kept}

    def evict(self, window, chain, blocks, evictions):
        leaving = self.choose(window, evictions)
        self.left.append(leaving)
        for n in leaving:
            del self.received[n]
        for index in range(len(self.layers)):
            block = []
            for n in leaving:
                rotated, before, value = window[index].pop(n)
                key = rotated if self.adapter is None or self.adapter.key_space == "post_rotary" else before
                block.append((key, value))
            if self.adapter is not None and self.adapter.kind == "thought":
                blocks[index].append(block)
                chain[index].append(self.fold(chain[index][-1], index, block))

    def layer(self, index, hidden, position, token_index, read, prompt_cache, window):
        layer, attention = self.layers[index], self.layers[index].self_attn
        x = rms_norm(hidden, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        query = self.apply(index, "q_proj", x, read).view(-1, attention.head_dim)
        if hasattr(attention, "q_norm"):
            query = rms_norm(query, attention.q_norm.weight, attention.q_norm.variance_epsilon)
        before = self.keys_of(index, self.apply(index, "k_proj", x, read))
        value = self.apply(index, "v_proj", x, read)
        query, rotated = rotate(query, self.config, position), rotate(before, self.config, position)
        rotated, before, value = self.stored(rotated, before, value, position)
        if token_index < 0:
            prompt_cache.append((rotated.reshape(-1), value))
        else:
            window[token_index] = (rotated.reshape(-1), before.reshape(-1), value)
        seen = prompt_cache + [(kept[0], kept[2]) for kept in window.values()]
        keys = torch.stack([k for k, _ in seen]).view(len(seen), -1, attention.head_dim)
        values = torch.stack([v for _, v in seen]).view(len(seen), -1, attention.head_dim)
        group = query.shape[0] // keys.shape[1]
        heads = []
        for head in range(query.shape[0]):
            scores = keys[:, head // group] @ query[head] / attention.head_dim**0.5
            probabilities = torch.softmax(scores, 0)
            heads.append(probabilities @ values[:, head // group])
            for n, probability in zip(window, probabilities[len(prompt_cache) :].tolist(), strict=True):
                self.received.setdefault(n, []).append((token_index, probability, len(seen)))
        hidden = hidden + self.apply(index, "o_proj", torch.cat(heads), read)
        norm = layer.post_attention_layernorm
        x = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        gate, up = self.apply(index, "gate_proj", x, read), self.apply(index, "up_proj", x, read)
        return hidden + self.apply(index, "down_proj", torch.nn.functional.silu(gate) * up, read)
