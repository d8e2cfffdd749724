// A row of logits after its sums are known, and the softcap's derivative.
#pragma once
#include "common.h"

namespace rlhf {

// log p of the taken token, `above` the shift, of exponents t = rounded * (w - shift) whose log-sum and mean are given.
// They should have been made with `factor`: to first order, its rounding moved the log-sum as it moved their mean. Left in, a
// log-prob of -15 would be off by its last places as a whole.
RLHF_HD double taken_logprob(double above, double factor, double rounded, double log_sum, double mean) {
    return above * factor - log_sum - (factor / rounded - 1) * mean;
}

// tanh'(x) from e^(-2 |x|), a float or a vector; 1 - tanh^2 would cancel where tanh is near 1.
template <class V>
RLHF_HD V tanh_slope(V decay) {
    return 4.f * decay / ((1.f + decay) * (1.f + decay));
}

}  // namespace rlhf
