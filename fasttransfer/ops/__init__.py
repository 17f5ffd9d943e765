"""The dispatcher operations ``torch.ops.fasttransfer.*``: schema, pure-torch kernel, fake kernel, autograd."""
