"""Networks as the models of `ldm_pipe` call them, one file a family, and the light ones, which need torch alone.

A new family is a file with three things and a row in `ldm_pipe/families.py`:
an `nn.Module` with `forward(x, time, cond)`, which hands x [B,C,H,W], the path's time [B] and what it needs of the `Cond` to
the class of diffusers; a frozen dataclass that makes the `Cond` of prompts, of the towers in `text.py`, with a `negative`
where a negative prompt is read in another way, and with the `ids` of prompts and an `encode` of those, which give training its
gradients; and `assemble(parts)`, which puts both and the codec into a `Made`.
`sd3.py` is a plain one, `dit.py` one without text. `scripts/tiny_families.py` makes the checkpoint that its test compares with
diffusers' pipeline.
"""
