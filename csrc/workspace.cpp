#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace safnet {
namespace {

constexpr size_t kAlignment = 64;  // as torch's own memory, a line of cache and a vector
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostWaste = 2;  // parts of up to this many times what is asked for are taken

// Advice only: nothing changes where huge pages are not offered.
void* allocate(size_t bytes) {
  void* const memory = std::aligned_alloc(bytes < 2 * kHugePage ? kAlignment : kHugePage, bytes);
#if defined(__linux__)
  if (memory != nullptr && bytes >= 2 * kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

thread_local std::shared_ptr<Workspace> current;
thread_local int64_t blocks = 0;

}  // namespace

Workspace::Part Workspace::take(size_t bytes) {
  const size_t unit = bytes < 2 * kHugePage ? kAlignment : kHugePage;
  bytes = (bytes + unit - 1) / unit * unit;
  Part part{nullptr, bytes};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto least = [](const Part& unused, size_t wanted) { return unused.bytes < wanted; };
    const auto found = std::lower_bound(unused_.begin(), unused_.end(), bytes, least);
    if (found != unused_.end() && found->bytes <= kMostWaste * bytes) {
      part = *found;
      unused_.erase(found);
      unused_bytes_ -= part.bytes;
    }
    used_ += part.bytes;
    most_used_ = std::max(most_used_, used_);
    free_unused(most_used_ - used_);
  }
  if (part.memory == nullptr) part.memory = allocate(part.bytes);
  return part;
}

void Workspace::give_back(const Part& part) {
  const std::lock_guard<std::mutex> lock(mutex_);
  used_ -= part.bytes;
  const auto larger = [](size_t bytes, const Part& unused) { return bytes < unused.bytes; };
  unused_.insert(std::upper_bound(unused_.begin(), unused_.end(), part.bytes, larger), part);
  unused_bytes_ += part.bytes;
  if (ended_) free_unused(0);
}

void Workspace::end() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ended_ = true;
  free_unused(0);
}

size_t Workspace::bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return used_ + unused_bytes_;
}

// The smallest first, which are the cheapest to get anew.
void Workspace::free_unused(size_t most_bytes) {
  auto kept = unused_.begin();
  for (; unused_bytes_ > most_bytes; ++kept) {
    std::free(kept->memory);
    unused_bytes_ -= kept->bytes;
  }
  unused_.erase(unused_.begin(), kept);
}

void enter(std::shared_ptr<Workspace> workspace) {
  if (blocks++ == 0) current = std::move(workspace);
}

void leave() {
  if (blocks > 0 && --blocks == 0) current.reset();
}

std::shared_ptr<Workspace> current_workspace() { return current; }

}  // namespace safnet
