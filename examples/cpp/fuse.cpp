// Fuses three exposures by a package that AOTInductor compiled, without Python.
//
//   fuse compiled.pt2 fused.pfm short.ppm EV reference.ppm EV long.ppm EV
//
// The frames are binary PPM files of 8 or 16 bits with a display curve of gamma 2.2, the EVs their exposures in stops.
// Written is the last result of the package, linear radiance in the short exposure's units.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Frame {
  torch::Tensor ldr;  // (1, 3, H, W) in [0, 1]
  double ev = 0;
};

torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, highest = 0;
  if (!(file >> magic >> width >> height >> highest) || magic != "P6" || width < 1 || height < 1 || highest < 1 ||
      highest > 65535)
    throw std::runtime_error(path + ": not a binary PPM file (P6, without comments)");
  file.get();  // the one blank after the header
  const int64_t bytes = highest > 255 ? 2 : 1, count = height * width * 3;
  std::vector<uint8_t> data(count * bytes);
  if (!file.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size())))
    throw std::runtime_error(path + ": fewer pixels than its header says");
  torch::Tensor picture = torch::empty({1, height, width, 3});
  float* values = picture.data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const int code = bytes == 2 ? data[2 * i] << 8 | data[2 * i + 1] : data[i];
    values[i] = static_cast<float>(code) / static_cast<float>(highest);
  }
  return picture.permute({0, 3, 1, 2});
}

double read_number(const std::string& text) {
  size_t used = 0;
  double value = std::numeric_limits<double>::quiet_NaN();
  try {
    value = std::stod(text, &used);
  } catch (const std::logic_error&) {
  }
  if (used != text.size() || !std::isfinite(value)) throw std::runtime_error("an EV must be a number, got " + text);
  return value;
}

// The network's input: linear radiance in the short exposure's units, then the LDR values.
torch::Tensor exposure_input(const Frame& frame, double lowest_ev) {
  return torch::cat({frame.ldr.pow(2.2) / std::exp2(frame.ev - lowest_ev), frame.ldr}, 1).contiguous();
}

// (1, 3, H, W), as 32-bit floats; the rows of a PFM file go from the bottom to the top.
void write_pfm(const std::string& path, const torch::Tensor& picture) {
  const torch::Tensor rows = picture.to(torch::kFloat).squeeze(0).permute({1, 2, 0}).flip(0).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "PF\n" << rows.size(1) << ' ' << rows.size(0) << "\n-1.0\n";
  file.write(reinterpret_cast<const char*>(rows.data_ptr<float>()),
             static_cast<std::streamsize>(rows.numel() * sizeof(float)));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

void fuse(const std::vector<std::string>& arguments) {
  std::vector<Frame> frames;
  for (size_t i = 2; i < arguments.size(); i += 2)
    frames.push_back({read_ppm(arguments[i]), read_number(arguments[i + 1])});
  double lowest = frames[0].ev;
  for (const Frame& frame : frames) {
    lowest = std::min(lowest, frame.ev);
    if (frame.ldr.sizes() != frames[0].ldr.sizes()) throw std::runtime_error("the frames differ in size");
  }
  std::vector<torch::Tensor> exposures;
  for (const Frame& frame : frames) exposures.push_back(exposure_input(frame, lowest));

  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[0]);
  write_pfm(arguments[1], model.run(exposures).back());
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> arguments(values + 1, values + count);
  if (arguments.size() != 8) {
    std::cerr << "usage: fuse compiled.pt2 fused.pfm short.ppm EV reference.ppm EV long.ppm EV\n";
    return 2;
  }
  try {
    fuse(arguments);
  } catch (const std::exception& error) {
    std::cerr << "fuse: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
