"""The functions that other projects distil with: their signatures, defaults and conventions, over these kernels.

A changed import is the migration. One module per project, imported when you import it; none imports the project::

    from fasttransfer.compat.functional import kl_div_with_logits             # F.kl_div of softmaxes
    from fasttransfer.compat.trl import generalized_jsd_loss                  # GKDTrainer, DistillationTrainer, GOLD
    from fasttransfer.compat.torchtune import ForwardKLLoss                   # and the five others
    from fasttransfer.compat.mdistiller import dkd_loss, kd_loss
    from fasttransfer.compat.torchdistill import KDLoss, LogitStdKDLoss

What is the same in every one of them, and not as in the original:

- the result is float32 (float64 for float64 logits), computed in that type whatever the logits are;
- rows that are masked out are not read, and a batch without a counted row costs 0, with a zero gradient;
- a logit of -inf on both sides is no NaN; neither is a probability that underflows;
- bad input is a ``TypeError`` or ``ValueError`` before any work, and ``create_graph=True`` is an error in backward
  except where a docstring says that autograd does the work.

Each docstring names the version that it reproduces and what else differs.
"""
