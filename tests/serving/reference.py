"""Steered greedy decoding written out plainly in torch: no cache, no batch, none of the plugin's code."""

import torch

from fv_steer.pack import read_pack


class Reference:
    def __init__(self, directory, packs):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
        self.packs = {name: read_pack(path) for name, path in packs.items()}

    def greedy(self, prompt, steering, n):
        """Greedy tokens and their logprobs; the whole sequence is computed again for every token."""
        ids, logprobs = list(prompt), []
        for _ in range(n):
            row = self.logprobs(ids, len(prompt), steering)[-1]
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        return ids[len(prompt) :], logprobs

    @torch.no_grad()
    def logprobs(self, ids, prompt_len, steering):
        """[tokens, vocab] for one sequence."""
        handles = self._hooks(len(ids), prompt_len, steering) if steering else []
        try:
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, length, prompt_len, steering):
        pack = self.packs[steering["pack"]]
        use = pack.manifest.recommended
        scale, mode = steering.get("scale", use.scale), steering.get("mode", use.mode)
        apply, at = steering.get("apply", use.apply), steering.get("layer", use.layer)
        steered = torch.tensor(
            [
                apply == "all" or p == prompt_len - 1 or (apply == "generation" and p >= prompt_len)
                for p in range(length)
            ],
            dtype=torch.float32,
        )[:, None]
        layers = self.model.model.layers
        if mode == "fv":
            vector = torch.tensor(pack.fv) * scale
            return [layers[at].register_forward_hook(lambda m, a, out: out + steered * vector)]
        handles = []
        for index in {layer for layer, _ in pack.heads.tolist()}:
            offset = torch.zeros(pack.mean.shape[1:])
            for layer, head in pack.heads.tolist():
                if layer == index:
                    offset[head] = torch.tensor(pack.mean[layer, head]) * scale
            handles.append(
                layers[index].self_attn.o_proj.register_forward_pre_hook(
                    lambda m, a, offset=offset: (a[0] + steered * offset.flatten(),)
                )
            )
        return handles
