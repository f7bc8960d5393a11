// Runs a program on the inputs of a device test and writes what it returns.
//
//     runner PROGRAM.pte INPUTS OUTPUTS [METHOD [RUNS]]
//
// INPUTS holds shapes.txt, one line a sample with the sizes of each input ("[1,3,8,8] [2]"), and
// the raw bytes of input i of sample n in n_i.bin: little-endian, contiguous. Output i of sample n
// goes to OUTPUTS/n_i.bin, likewise. The program is loaded once and takes the samples in order.
// With RUNS above 1 each sample is computed that often, and must always give the same bytes.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using executorch::aten::SizesType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::MethodMeta;
using executorch::runtime::Tag;
namespace fs = std::filesystem;

// XNNPACK's kernels load whole vectors and may read that far beyond the end of an input.
constexpr size_t kReadBeyond = 128;

[[noreturn]] void fail(const std::string& why) {
  std::cerr << "runner: " << why << std::endl;
  std::exit(1);
}

std::vector<char> read(const fs::path& path, size_t size) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) fail("cannot read " + path.string());
  if (static_cast<size_t>(file.tellg()) != size) {
    fail(path.string() + " has " + std::to_string(file.tellg()) + " bytes, the program takes " +
         std::to_string(size));
  }
  std::vector<char> data(size + kReadBeyond);
  file.seekg(0).read(data.data(), static_cast<std::streamsize>(size));
  if (!file) fail("cannot read " + path.string());
  return data;
}

void write(const fs::path& path, const std::string& data) {
  std::ofstream file(path, std::ios::binary);
  if (!file.write(data.data(), static_cast<std::streamsize>(data.size())).flush()) {
    fail("cannot write " + path.string());
  }
}

// "[1,3,8,8]"; "[]" for a tensor without dimensions or a number.
std::vector<SizesType> parse_sizes(const std::string& word) {
  std::vector<SizesType> sizes;
  std::istringstream text(word.substr(1, word.size() - 2));
  for (std::string size; std::getline(text, size, ',');) sizes.push_back(std::stoi(size));
  return sizes;
}

template <typename T>
T number(const std::vector<char>& data) {
  T value;
  std::memcpy(&value, data.data(), sizeof(T));
  return value;
}

// One input; `data` keeps its bytes, `tensor` the tensor around them.
EValue load(const MethodMeta& meta, size_t i, const fs::path& path, std::vector<SizesType> sizes,
            std::vector<char>& data, TensorPtr& tensor) {
  const Tag tag = *meta.input_tag(i);
  if (tag == Tag::Int) return EValue(number<int64_t>(data = read(path, sizeof(int64_t))));
  if (tag == Tag::Double) return EValue(number<double>(data = read(path, sizeof(double))));
  if (tag == Tag::Bool) return EValue((data = read(path, 1))[0] != 0);
  if (tag == Tag::None) return EValue();
  if (tag != Tag::Tensor) fail("input " + std::to_string(i) + " is no tensor and no number");
  const auto dtype = meta.input_tensor_meta(i)->scalar_type();
  size_t bytes = executorch::runtime::elementSize(dtype);
  for (SizesType size : sizes) bytes *= static_cast<size_t>(size);
  data = read(path, bytes);
  tensor = executorch::extension::make_tensor_ptr(std::move(sizes), data.data(), dtype);
  return EValue(*tensor);
}

template <typename T>
std::string bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

std::string bytes_of(const EValue& value, const std::string& name) {
  if (value.isInt()) return bytes_of(value.toInt());
  if (value.isDouble()) return bytes_of(value.toDouble());
  if (value.isBool()) return std::string(1, value.toBool() ? '\1' : '\0');
  if (value.isNone()) return {};
  if (!value.isTensor()) fail(name + " is no tensor and no number");
  const auto& tensor = value.toTensor();
  const auto order = tensor.dim_order();
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] != i) fail(name + " is not contiguous");
  }
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()};
}

int main(int argc, char** argv) {
  if (argc < 4) fail("usage: runner PROGRAM.pte INPUTS OUTPUTS [METHOD [RUNS]]");
  const fs::path inputs = argv[2], outputs = argv[3];
  const std::string method = argc > 4 ? argv[4] : "forward";
  const int runs = argc > 5 ? std::atoi(argv[5]) : 1;
  if (runs < 1) fail("RUNS is a number from 1 on");

  Module module(argv[1]);
  if (module.load_method(method) != Error::Ok) {
    fail(std::string(argv[1]) + " or its method " + method + " cannot be loaded");
  }
  const auto meta = module.method_meta(method);
  std::ifstream shapes(inputs / "shapes.txt");
  if (!shapes) fail("cannot read " + (inputs / "shapes.txt").string());
  fs::create_directories(outputs);

  std::chrono::duration<double, std::milli> spent{};
  size_t sample = 0;
  for (std::string line; std::getline(shapes, line); ++sample) {
    const size_t count = meta->num_inputs();
    std::vector<std::vector<char>> data(count);
    std::vector<TensorPtr> tensors(count);
    std::vector<EValue> values;
    std::istringstream words(line);
    const std::string prefix = std::to_string(sample) + "_";
    for (std::string word; words >> word;) {
      const size_t i = values.size();
      if (i == count) fail("sample " + std::to_string(sample) + " has too many inputs");
      const fs::path path = inputs / (prefix + std::to_string(i) + ".bin");
      values.push_back(load(*meta, i, path, parse_sizes(word), data[i], tensors[i]));
    }
    if (values.size() != count) fail("sample " + std::to_string(sample) + " lacks inputs");

    std::vector<std::string> first;
    for (int run = 0; run < runs; ++run) {
      const auto start = std::chrono::steady_clock::now();
      const auto result = module.execute(method, values);
      spent += std::chrono::steady_clock::now() - start;
      if (!result.ok()) fail("the runtime refused sample " + std::to_string(sample));
      for (size_t i = 0; i < result->size(); ++i) {
        const std::string name = "output " + std::to_string(i) + " of sample " + prefix;
        std::string bytes = bytes_of((*result)[i], name);
        if (run == 0) {
          write(outputs / (prefix + std::to_string(i) + ".bin"), bytes);
          first.push_back(std::move(bytes));
        } else if (bytes != first[i]) {
          fail(name + " is another one in run " + std::to_string(run + 1));
        }
      }
    }
  }
  std::printf("%s: %zu samples, %.3f ms a run\n", method.c_str(), sample,
              sample == 0 ? 0.0 : spent.count() / static_cast<double>(sample * runs));
  return 0;
}
