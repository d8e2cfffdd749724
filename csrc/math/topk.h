// The divergence of a student from the teacher's top-k probabilities: one term per listed token, and one for the others together.
#pragma once
#include "common.h"

namespace rlhf {

// The choices of rlhf_kernels/token_args.py, in the same order.
enum class Direction : int { forward = 0, reverse = 1, jsd = 2 };

struct TopkRule {
    Direction direction;
    bool lump;    // whether the tokens that are not listed are one more term
    double beta;  // weight of the teacher in the mixture of jsd
};

constexpr double kTailFloor = 1e-7;  // smallest probability of the tokens that are not listed

struct TopkTerm {
    double value;
    double slope;  // d value / d log q, for a change of log q only
};

// x * y, where 0 * inf is 0: a token of probability 0 adds nothing.
RLHF_HD double times(double x, double y) { return x == 0 ? 0 : x * y; }

// Return the term of a token of the student's probability q = e^s and the teacher's p = e^t. forward: p (t - s), of KL(p || q).
// reverse: q (s - t), of KL(q || p). jsd (Agarwal et al. 2024, eq. 1): beta p (t - log m) + (1 - beta) q (s - log m), with the
// mixture m = beta p + (1 - beta) q.
RLHF_HD TopkTerm topk_term(double s, double t, const TopkRule& rule) {
    const double q = exp(s), p = exp(t);
    if (rule.direction == Direction::forward) return {times(p, t - s), -p};
    if (rule.direction == Direction::reverse) return {times(q, s - t), q + times(q, s - t)};
    const double a = s + log1p(-rule.beta), b = t + log(rule.beta), high = a > b ? a : b;
    const double mixture = high + log1p(exp((a > b ? b : a) - high));
    const double slope = (1 - rule.beta) * times(q, s - mixture);
    return {rule.beta * times(p, t - mixture) + slope, slope};
}

// The other tokens as one: their probabilities, and the term, which is not there without `lump`.
struct TopkTail {
    double student;  // at least kTailFloor
    TopkTerm term;   // the slope is 0 where the floor applies
};

RLHF_HD TopkTail topk_tail(double student_mass, double teacher_mass, const TopkRule& rule) {
    const double q = 1 - student_mass, p = 1 - teacher_mass;
    TopkTail tail{q > kTailFloor || q != q ? q : kTailFloor, {0, 0}};
    if (!rule.lump) return tail;
    tail.term = topk_term(log(tail.student), log(p > kTailFloor || p != p ? p : kTailFloor), rule);
    if (q <= kTailFloor) tail.term.slope = 0;
    return tail;
}

// Return d loss / d log q of a listed token: its own slope, and through the others, whose probability is 1 minus the sum.
RLHF_HD double topk_slope(double s, double own, const TopkTail& tail) { return own - times(exp(s), tail.term.slope / tail.student); }

}  // namespace rlhf
