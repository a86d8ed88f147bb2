// What has been written so far: a tree, since hypotheses share what they have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "generation/options.h"

namespace encdec::generation {

class Tree {
 public:
  // attention_size: of what is kept of each step, 0: nothing.
  explicit Tree(int64_t attention_size) : attention_size_(attention_size) {}

  static constexpr int32_t kRoot = -1;  // nothing is written yet

  int32_t add(int32_t parent, int32_t token, float log_prob, const float* attention) {
    nodes_.push_back({token, parent, log_prob});
    if (attention_size_) {
      attention_.insert(attention_.end(), attention, attention + attention_size_);
    }
    return static_cast<int32_t>(nodes_.size()) - 1;
  }

  int32_t token(int32_t node) const { return nodes_[static_cast<size_t>(node)].token; }

  // Visits a node and those before it, the last one first.
  template <class Visit>
  void walk(int32_t node, const Visit& visit) const {
    for (; node != kRoot; node = nodes_[static_cast<size_t>(node)].parent) visit(node);
  }

  // The written tokens behind those that `to` begins with.
  void append(int32_t node, Tokens* to) const {
    const auto first = static_cast<std::ptrdiff_t>(to->size());
    walk(node, [&](int32_t n) { to->push_back(token(n)); });
    std::reverse(to->begin() + first, to->end());
  }

  std::vector<float> log_probs(int32_t node) const {
    std::vector<float> found;
    walk(node, [&](int32_t n) { found.push_back(nodes_[static_cast<size_t>(n)].log_prob); });
    std::reverse(found.begin(), found.end());
    return found;
  }

  // [written][attention_size]
  std::vector<float> attention(int32_t node) const {
    std::vector<int32_t> path;
    walk(node, [&](int32_t n) { path.push_back(n); });
    std::vector<float> found;
    for (auto n = path.rbegin(); n != path.rend(); ++n) {
      const float* const row = attention_.data() + *n * attention_size_;
      found.insert(found.end(), row, row + attention_size_);
    }
    return found;
  }

  // The sum over the first `source` positions of log(min(attention they got, 1)): how much of the
  // source was left out (Wu et al., 2016, arXiv:1609.08144, section 7).
  double coverage(int32_t node, int64_t source) {
    if (attention_size_ == 0) return 0.0;
    sums_.assign(static_cast<size_t>(source), 0.0f);
    walk(node, [&](int32_t n) {
      const float* const row = attention_.data() + n * attention_size_;
      for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += row[i];
    });
    double logs = 0.0;
    for (const float sum : sums_) {
      // Nothing at all, by underflow: a number in place of -infinity.
      const double received = std::max(double(sum), double(std::numeric_limits<float>::min()));
      logs += std::log(std::min(received, 1.0));
    }
    return logs;
  }

 private:
  struct Node {
    int32_t token, parent;
    float log_prob;
  };

  const int64_t attention_size_;
  std::vector<Node> nodes_;
  std::vector<float> attention_;  // [nodes][attention_size]
  std::vector<float> sums_;
};

}  // namespace encdec::generation
