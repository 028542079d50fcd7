// Memory that the results of a block of calls hand on to each other, instead of each getting fresh memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "library.h"

namespace safnet {

// Shared by its owner and the results that lie in its memory, which may outlive the owner. It never holds more than
// results have needed at one time.
class SAFNET_EXPORT Workspace {
 public:
  ~Workspace() { end(); }

  struct Part {
    void* memory;
    size_t bytes;
  };

  // At least `bytes`, for `give_back`. No memory where there is none left.
  Part take(size_t bytes);
  void give_back(const Part& part);

  // Its owner is gone: from now on what is given back is freed.
  void end();

  // Of results that live, and of those that are gone.
  size_t bytes();

 private:
  void free_unused(size_t most_bytes);

  std::mutex mutex_;
  bool ended_ = false;
  size_t used_ = 0, most_used_ = 0, unused_bytes_ = 0;
  std::vector<Part> unused_;  // from the smallest to the largest
};

// From `enter` to `leave` results of the calling thread lie in a workspace: that of the outermost of such blocks.
SAFNET_EXPORT void enter(std::shared_ptr<Workspace> workspace);
SAFNET_EXPORT void leave();

// That of the calling thread's block. Null outside of blocks.
SAFNET_EXPORT std::shared_ptr<Workspace> current_workspace();

// Smaller memory torch's allocator keeps, and hands on by itself. Fresh memory comes from the system page by page as it
// is first written, which takes as long as a quarter of a convolution.
constexpr size_t kFresh = size_t{1} << 20;

}  // namespace safnet
