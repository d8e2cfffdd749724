// The log-prob of a token from the sums of its row of logits, and the derivative of the softcap.
#pragma once
#include "common.h"

namespace rlhf {

// Return the log-prob of the token whose logit is w = shift + above. `log_sum` is the log of the sum of e^t, and `mean` is the
// mean of t under the distribution, for the exponents t = rounded * (w - shift), where `rounded` is `factor` in float32. To
// first order, this rounding changes the log-sum by (1 - factor / rounded) * mean, which the last term corrects. Without the
// correction, a log-prob of -15 would be wrong in its last digits.
RLHF_HD double taken_logprob(double above, double factor, double rounded, double log_sum, double mean) {
    return above * factor - log_sum - (factor / rounded - 1) * mean;
}

// Return tanh'(x) from `decay` = e^(-2 |x|), for a float or a vector; 1 - tanh^2 would cancel where |tanh| is near 1.
template <class V>
RLHF_HD V tanh_slope(V decay) {
    return 4.f * decay / ((1.f + decay) * (1.f + decay));
}

}  // namespace rlhf
