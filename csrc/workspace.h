// Memory that the results of a block of calls hand on to each other, instead of each getting fresh memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "library.h"

namespace safnet {

// Shared by the block that opened it and the results that lie in its memory, which may outlive the block. It never
// holds more than results have needed at one time.
class SAFNET_EXPORT Workspace {
 public:
  ~Workspace() { close(); }

  struct Part {
    void* memory;
    size_t bytes;
  };

  // At least `bytes`, for `give_back`. No memory where there is none left.
  Part take(size_t bytes);
  void give_back(const Part& part);

  // From now on what is given back is freed.
  void close();
  bool is_open();

  // Of results that live, and of those that are gone.
  size_t bytes();

 private:
  void free_unused(size_t most_bytes);

  std::mutex mutex_;
  bool open_ = true;
  size_t used_ = 0, most_used_ = 0, unused_bytes_ = 0;
  std::vector<Part> unused_;  // from the smallest to the largest
};

// Opens one for the calling thread, until it is closed. Null where one is open already.
SAFNET_EXPORT std::shared_ptr<Workspace> open_workspace();

// That of the calling thread. Null where none is open.
std::shared_ptr<Workspace> current_workspace();

}  // namespace safnet
