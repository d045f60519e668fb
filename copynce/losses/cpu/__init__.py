"""CopyNCE on the CPU: closed-form gradients around one affinity product forward and two products backward.

With raw tokens Q_i and R_j, their inverse lengths u_i and v_j, ``S_ij = u_i v_j (Q_i . R_j) / tau`` and
``E = exp(S - 1/tau)`` (no running maximum: S is bounded by 1/tau), one matrix gives both softmaxes,

    loss   = (sum_i m_i log sum_j E_ij + sum_j n_j log sum_i E_ij - sum_ij T_ij (S_ij - 1/tau)) / 2
    dS_ij  = (E_ij (m_i / sum_j E_ij + n_j / sum_i E_ij) - T_ij) / 2,      G_ij = u_i v_j dS_ij / tau
    dQ_i   = sum_j G_ij R_j - u_i^2 (sum_j dS_ij S_ij) Q_i                 and the same for R with G transposed,

where T is the sum of both directions' priors, each over its number of patches, and m, n their row masses. Where neither
query patch i nor reference patch j shows a copy (m_i = n_j = 0), G_ij is 0 and nothing needs S_ij. So patches with a
copy come first, in both pictures, and the products leave the corner of the others out.

``op`` holds the registered operators and shares samples out among threads, ``passes`` takes a sample from tables and
tokens to its loss and G, ``prior`` makes T, ``tiles`` the products.
"""

FAST = {"reassoc", "contract", "nsz"}
"""Numba's ``fastmath``: sums may be reordered and fused so that they vectorise; NaN and infinity keep their meaning.

What is compiled so must be inlined: a caller holds its own copy of a function, whose sums may run in another order, and
which of the two is called depends on whether the code was just compiled or comes from the cache."""
