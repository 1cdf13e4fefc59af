"""Rewards and objectives checked by exact enumeration (docs/conformance.md).

A policy of a few hundred float64 weights has 40 completions. The code that trains runs on each of
them. The mean of its gradients over the policy's own distribution is compared with the gradient of
the objective that the specification states, written out in plain torch and differentiated.

    world       the policy, its completions, and exact sums over them
    subjects    a trainer on that policy; an update over micro-batches and simulated ranks
    report      cases, comparisons, and the table
    generic     what holds for every method
    the others  the stated objective of each component, case by case
    suite       all cases, the components without one, and components from outside
"""
