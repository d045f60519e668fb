"""CopyNCE, both directions at once: loss and gradients without a [B, L, L] float tensor or a normalised token.

With raw tokens Q_i and R_j, their inverse lengths u_i and v_j, s = 1 / tau and ``S_ij = s u_i v_j (Q_i . R_j)``
(``reference`` states the loss, eq. 6 and 7):

    E_ij = exp(S_ij - s)                 S is bounded by s: no running maximum, and row *and* column sums are plain sums
    loss = sum_i m_i log sum_j E_ij + sum_j n_j log sum_i E_ij - sum_ij T_ij (S_ij - s)
    dS_ij = E_ij (a_i + b_j) - T_ij,     a_i = m_i / sum_j E_ij,   b_j = n_j / sum_i E_ij
    dQ_i = u_i (sum_j G_ij R_j - t_i u_i Q_i),   G_ij = s v_j dS_ij,   t_i = sum_j G_ij cos_ij / v_j

where T is the sum of both priors and m, n their masses, each times half of the pair's weight in the batch over its
number of patches. G is taken as the tensor cores see it, rounded: t then cancels the radial part of what was added.
dR is the same program with the pictures exchanged.

Five launches with the two of ``patch_overlap`` before: forward (a block of query rows by all columns), a finalising one
(column sums; a pair each) and backward (both pictures). No atomics: the same bits every time.

For backward the forward leaves the cosines as int16 in steps of 1/32000, when the tokens have 16 bits and there are 64
patches or more: 2 bytes an entry for half of the backward's products, with an error far below the rounding of the
gradient (a bfloat16 cosine would not do). The sums in a and b are of these rounded cosines, so that each softmax adds
to 1: where a match is certain dS is the difference of nearly equal numbers, and an error in their ratio would be all
that is left of it. The loss is of the exact cosines: to first order ``sum E exp(x) = sum E + sum E x``, x the rounding.
For float32 tokens backward computes the cosines again, in float32.

Shapes: B pairs, Lq and Lr patches of query and reference, D channels, Sq and Sr: L rounded up to 16, Sc: Lr up to 8.
Cost of 16-bit tokens: 2 B L D FLOP forward and 4 backward per column; tokens, counts (1 byte) and cosines (2 bytes)
read or written once by forward and once by backward, gradients written.

``forward`` and ``backward`` hold the kernels, each with the function that launches it, ``device`` what both call,
``launch_config`` their launch settings and limits, ``op`` the registered operators, ``reference`` the plain twin.
"""
