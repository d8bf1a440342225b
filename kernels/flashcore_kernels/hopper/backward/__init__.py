"""The Hopper backward in Gluon: one kernel for the queries' gradient, one for the keys' and the values'.

    S = scale Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta), delta = rowsum(dO * O) - dLse
    dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO

`preprocess` leaves delta and lse where both kernels find them. `dq` keeps 128 queries and walks over the keys they
see; `dkdv` keeps 128 keys of a KV head and walks over the queries that see them, head after head of its group. Scores
and dP are made twice, seven products in place of five: that is what it costs that every sum has one owner, who adds in
the order of the sequence. So two runs give the same bits, and a sequence has the same bits alone, batched or padded.
"""
