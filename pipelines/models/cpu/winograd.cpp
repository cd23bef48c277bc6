// 3 x 3 convolutions with stride 1 and padding 1 by Winograd's minimal filtering, F(4 x 4, 3 x 3), in float32, on the
// calling thread. The method is that of Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016).
//
// A tile of 4 x 4 output pixels depends on 6 x 6 input pixels. The transforms evaluate and interpolate polynomials at
// the points 0, 1, -1, 1/2, -2 and infinity, which has half the rounding error of the usual 2 and -2. Between the two
// transforms are 36 matrix products, one for each pair of points, with a quarter of the multiplications of the
// convolution itself.
//
// Images are channels-last: image x row x column x channel.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

// A block of kRows x 2 vectors of a product fills the vector registers.
#ifdef __AVX512F__
constexpr long kLanes = 16, kRows = 12;
#else
constexpr long kLanes = 8, kRows = 6;
#endif
constexpr long kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;
// Number of tiles that go through the three steps together: enough to read the weights rarely, and few enough to stay
// in the cache.
constexpr long kChunk = 72;
static_assert(kChunk % kRows == 0, "a chunk consists of whole blocks of rows");
// Number of channels per partial sum. A single long sum would have rounding errors twice as large.
constexpr long kSummed = 32;

using Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias)) = float;

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

Vector load_some(const float* from, long count) {
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

long round_up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Convolution {
  long num_images, height, width, in_channels, out_channels;

  long tiles_down() const { return round_up(height, kTile) / kTile; }
  long tiles_across() const { return round_up(width, kTile) / kTile; }
  long num_tiles() const { return num_images * tiles_down() * tiles_across(); }
  // Channels are padded to whole vectors.
  long in_stride() const { return round_up(in_channels, kLanes); }
  long out_stride() const { return round_up(out_channels, kLanes); }
  // Size of a plane: all tiles of a chunk at one pair of points. The extra vector keeps the 36 planes from mapping to
  // the same cache sets.
  long in_plane() const { return kChunk * in_stride() + kLanes; }
  long out_plane() const { return kChunk * out_stride() + kLanes; }
};

// Top left output pixel of a tile.
struct Corner {
  long image, row, column;

  Corner(const Convolution& how, long tile) {
    const long per_image = how.tiles_down() * how.tiles_across(), at = tile % per_image;
    image = tile / per_image;
    row = at / how.tiles_across() * kTile;
    column = at % how.tiles_across() * kTile;
  }
};

// Find the pixels of a tile. Pixels outside of the image point to `outside`.
template <long kSide, typename Float>
void find_pixels(const Convolution& how, Corner corner, long margin, Float* images, long channels, Float* outside,
                 Float** pixels) {
  for (long i = 0; i < kSide; ++i) {
    for (long j = 0; j < kSide; ++j) {
      const long row = corner.row - margin + i, column = corner.column - margin + j;
      const bool is_inside = row >= 0 && row < how.height && column >= 0 && column < how.width;
      const long pixel = (corner.image * how.height + row) * how.width + column;
      *pixels++ = is_inside ? images + pixel * channels : outside;
    }
  }
}

// Evaluate the six values of a line at the six points.
inline __attribute__((always_inline)) void evaluate(const Vector* line, Vector* points) {
  const Vector even = line[4] - line[2], odd = line[3] - line[1];
  const Vector sum = even + 1.5f * line[3], difference = odd + 1.5f * line[2];
  points[0] = line[0] - line[2] + even + 1.5f * odd;
  points[1] = sum + difference;
  points[2] = sum - difference;
  points[3] = even + 2.0f * odd;
  points[4] = even - 0.5f * odd;
  points[5] = line[5] - line[3] - odd + 1.5f * even;
}

// Interpolate the four output values of a line from the six points.
inline __attribute__((always_inline)) void interpolate(const Vector* points, Vector* line) {
  const Vector sum = points[1] + points[2], difference = points[1] - points[2];
  line[0] = points[0] + sum + (points[3] + points[4]);
  line[1] = difference + 0.5f * points[3] - 2.0f * points[4];
  line[2] = sum + 0.25f * points[3] + 4.0f * points[4];
  line[3] = difference + 0.125f * points[3] - 8.0f * points[4] + points[5];
}

// Apply `transform` to the columns of a window of 6 x 6 vectors, then to the rows of the result, which is a square of
// kSide x kSide vectors.
template <long kSide, typename Transform, typename Read, typename Write>
inline __attribute__((always_inline)) void transform_window(Transform transform, Read read, Write write) {
  Vector columns[kWindow * kSide];  // each line holds the results of one column
#pragma GCC unroll 6
  for (long j = 0; j < kWindow; ++j) {
    Vector column[kWindow];
#pragma GCC unroll 6
    for (long i = 0; i < kWindow; ++i) column[i] = read(i, j);
    transform(column, columns + j * kSide);
  }
#pragma GCC unroll 6
  for (long i = 0; i < kSide; ++i) {
    Vector row[kWindow], results[kSide];
#pragma GCC unroll 6
    for (long j = 0; j < kWindow; ++j) row[j] = columns[j * kSide + i];
    transform(row, results);
#pragma GCC unroll 6
    for (long j = 0; j < kSide; ++j) write(i, j, results[j]);
  }
}

// Transform one vector of channels of a tile to the 36 planes. `read` loads the vector of a pixel.
template <typename Read>
inline __attribute__((always_inline)) void transform_pixels(const float* const* pixels, Read read, float* planes,
                                                            long plane) {
  transform_window<kWindow>(
      [](const Vector* line, Vector* points) { evaluate(line, points); },
      [=](long i, long j) { return read(pixels[i * kWindow + j]); },
      [=](long i, long j, Vector value) { store(planes + (i * kWindow + j) * plane, value); });
}

void transform_input(const Convolution& how, const float* images, const float* zeros, long first, long num_tiles,
                     float* planes) {
  const long channels = how.in_channels, whole = channels / kLanes * kLanes;
  for (long t = 0; t < num_tiles; ++t, planes += how.in_stride()) {
    const float* pixels[kPoints];
    find_pixels<kWindow>(how, Corner(how, first + t), 1, images, channels, zeros, pixels);
    for (long c = 0; c < whole; c += kLanes) {
      transform_pixels(pixels, [c](const float* pixel) { return load(pixel + c); }, planes + c, how.in_plane());
    }
    if (whole < channels) {
      const auto read = [=](const float* pixel) { return load_some(pixel + whole, channels - whole); };
      transform_pixels(pixels, read, planes + whole, how.in_plane());
    }
  }
}

// Multiply kRows tiles by the weights of kVectors vectors of output channels.
template <long kVectors>
void multiply_block(const float* tiles, long tile_stride, long depth, const float* weights, float* product,
                    long product_stride) {
  for (long first = 0; first < depth; first += kSummed) {
    Vector sums[kRows][kVectors] = {};
    for (long k = first; k < std::min(first + kSummed, depth); ++k, weights += kVectors * kLanes) {
      Vector weight[kVectors];
      for (long v = 0; v < kVectors; ++v) weight[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (long r = 0; r < kRows; ++r) {
        const float value = tiles[r * tile_stride + k];
        for (long v = 0; v < kVectors; ++v) sums[r][v] += value * weight[v];
      }
    }
#pragma GCC unroll 16
    for (long r = 0; r < kRows; ++r) {
      for (long v = 0; v < kVectors; ++v) {
        float* const at = product + r * product_stride + v * kLanes;
        store(at, first == 0 ? sums[r][v] : load(at) + sums[r][v]);
      }
    }
  }
}

long block_width(const Convolution& how, long channel) { return std::min(2 * kLanes, how.out_stride() - channel); }

void multiply(const Convolution& how, const float* planes, const float* weights, long num_tiles, float* products) {
  for (long point = 0; point < kPoints; ++point, planes += how.in_plane(), products += how.out_plane()) {
    for (long c = 0, width; c < how.out_stride(); c += width, weights += how.in_channels * width) {
      width = block_width(how, c);
      const auto multiply_them = width == kLanes ? multiply_block<1> : multiply_block<2>;
      for (long t = 0; t < num_tiles; t += kRows) {  // the last block may include stale tiles of an earlier chunk
        multiply_them(planes + t * how.in_stride(), how.in_stride(), how.in_channels, weights,
                      products + t * how.out_stride() + c, how.out_stride());
      }
    }
  }
}

// Transform one vector of channels of a tile back from the 36 planes. `write` stores the vector of a pixel.
template <typename Write>
inline __attribute__((always_inline)) void transform_product(const float* planes, long plane, Vector bias, bool has_relu,
                                                             float* const* pixels, Write write) {
  const Vector zero = {};
  transform_window<kTile>(
      [](const Vector* points, Vector* line) { interpolate(points, line); },
      [=](long i, long j) { return load(planes + (i * kWindow + j) * plane); },
      [=](long i, long j, Vector value) {
        value += bias;
        write(pixels[i * kTile + j], has_relu ? (value < zero ? zero : value) : value);
      });
}

void transform_output(const Convolution& how, const float* planes, const float* bias, bool has_relu, long first,
                      long num_tiles, float* nowhere, float* output) {
  const long channels = how.out_channels, whole = channels / kLanes * kLanes, rest = channels - whole;
  for (long t = 0; t < num_tiles; ++t, planes += how.out_stride()) {
    float* pixels[kTile * kTile];
    find_pixels<kTile>(how, Corner(how, first + t), 0, output, channels, nowhere, pixels);
    for (long c = 0; c < whole; c += kLanes) {
      const auto write = [c](float* pixel, Vector value) { store(pixel + c, value); };
      transform_product(planes + c, how.out_plane(), load(bias + c), has_relu, pixels, write);
    }
    if (rest) {
      const auto write = [=](float* pixel, Vector value) { std::memcpy(pixel + whole, &value, rest * sizeof(float)); };
      transform_product(planes + whole, how.out_plane(), load_some(bias + whole, rest), has_relu, pixels, write);
    }
  }
}

// Return a buffer that the thread reuses for its next convolution, or null if there is no memory.
float* scratch(size_t num_floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (size < num_floats) {
    const size_t num_bytes = round_up(num_floats * sizeof(float), 64);
    size = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, num_bytes)));
    if (!memory) return nullptr;
    std::memset(memory.get(), 0, num_bytes);
    size = num_floats;
  }
  return memory.get();
}

}  // namespace

extern "C" {

// Return the number of floats in the packed weights of a layer.
long winograd_packed_size(long in_channels, long out_channels) {
  return kPoints * in_channels * round_up(out_channels, kLanes);
}

// Pack transformed weights, point x in x out, in the order in which `multiply` reads them.
void winograd_pack(const float* weights, long in_channels, long out_channels, float* packed) {
  const Convolution how = {0, 0, 0, in_channels, out_channels};
  for (long point = 0; point < kPoints; ++point, weights += in_channels * out_channels) {
    for (long c = 0, width; c < how.out_stride(); c += width) {
      width = block_width(how, c);
      const long count = std::min(width, out_channels - c);
      for (long i = 0; i < in_channels; ++i, packed += width) {
        std::copy_n(weights + i * out_channels + c, count, packed);
        std::fill(packed + count, packed + width, 0.0f);
      }
    }
  }
}

// Convolve images, image x row x column x in channels, to `output` with the out channels. Return 0, or 1 if there is no
// memory.
int winograd_convolve(const float* images, const float* packed, const float* bias, float* output, long num_images,
                      long height, long width, long in_channels, long out_channels, int has_relu) {
  const Convolution how = {num_images, height, width, in_channels, out_channels};
  const size_t in_size = kPoints * how.in_plane(), out_size = kPoints * how.out_plane();
  float* planes = scratch(in_size + out_size + how.in_stride() + how.out_stride());
  if (!planes) return 1;
  float *products = planes + in_size, *zeros = products + out_size, *nowhere = zeros + how.in_stride();
  std::fill(zeros, nowhere, 0.0f);
  for (long first = 0; first < how.num_tiles(); first += kChunk) {
    const long num_tiles = std::min(kChunk, how.num_tiles() - first);
    transform_input(how, images, zeros, first, num_tiles, planes);
    multiply(how, planes, packed, num_tiles, products);
    transform_output(how, products, bias, has_relu, first, num_tiles, nowhere, output);
  }
  return 0;
}
}
