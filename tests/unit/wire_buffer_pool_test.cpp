// SPDX-License-Identifier: Apache-2.0
#include "wire_test_util.hpp"

#include <gtest/gtest.h>
#include <msgtrans/wire/buffer_pool.hpp>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

namespace msgtrans::wire {
namespace {

using namespace test;

TEST(WireBuffer, AppendsResizesAndClearsWithinItsCapacity) {
  Buffer buffer(8);
  EXPECT_TRUE(buffer.empty());
  buffer.append(bytes_of("abc"));
  buffer.append({});
  buffer.append(bytes_of("defgh"));
  EXPECT_EQ(text_of(buffer), "abcdefgh");
  buffer.resize(2);
  EXPECT_EQ(text_of(buffer), "ab");
  buffer.resize(4);
  EXPECT_EQ(text_of(buffer), "abcd") << "resize must neither zero nor move";
  buffer.clear();
  EXPECT_EQ(buffer.size(), 0U);
  EXPECT_EQ(buffer.capacity(), 8U);
}

TEST(WireBuffer, BeyondItsCapacityItThrowsAndIsUnchanged) {
  Buffer buffer(4);
  buffer.append(bytes_of("abc"));
  EXPECT_THROW(buffer.append(bytes_of("de")), std::length_error);
  EXPECT_THROW(buffer.resize(5), std::length_error);
  EXPECT_EQ(text_of(buffer), "abc");
}

TEST(WireBuffer, AMovedFromBufferHasNothing) {
  Buffer from(16);
  from.append(bytes_of("abc"));
  Buffer to(std::move(from));
  EXPECT_EQ(text_of(to), "abc");
  EXPECT_EQ(from.capacity(), 0U);  // NOLINT(bugprone-use-after-move): what it is left as is the contract
  EXPECT_EQ(from.size(), 0U);
  Buffer assigned(4);
  assigned = std::move(to);
  EXPECT_EQ(text_of(assigned), "abc");
  EXPECT_EQ(assigned.capacity(), 16U);
  EXPECT_EQ(to.capacity(), 0U);
}

TEST(WireBufferPool, CapacitiesArePowersOfTwoFrom256) {
  BufferPool pool;
  const std::size_t sizes[][2] = {{0, 256},     {1, 256},     {256, 256},        {257, 512},
                                  {4096, 4096}, {4097, 8192}, {1000000, 1 << 20}};
  for (const auto& [asked, given] : sizes) EXPECT_EQ(pool.take(asked).capacity(), given) << asked;
}

TEST(WireBufferPool, AGivenBufferIsTakenAgainEmpty) {
  BufferPool pool;
  Buffer buffer = pool.take(1000);
  const std::byte* const memory = buffer.data();
  buffer.append(bytes_of("left over"));
  pool.give(std::move(buffer));
  EXPECT_EQ(buffer.capacity(), 0U);  // NOLINT(bugprone-use-after-move)
  EXPECT_EQ(pool.kept_bytes(), 1024U);

  const Buffer other_size = pool.take(2000);
  EXPECT_NE(other_size.data(), memory);
  EXPECT_EQ(pool.kept_bytes(), 1024U);

  const Buffer again = pool.take(600);
  EXPECT_EQ(again.data(), memory);
  EXPECT_EQ(again.size(), 0U);
  EXPECT_EQ(again.capacity(), 1024U);
  EXPECT_EQ(pool.kept_bytes(), 0U);
}

TEST(WireBufferPool, KeepsAtMostItsBoundAndFreesTheRest) {
  BufferPool pool(1024);
  std::vector<Buffer> taken;
  for (int i = 0; i < 5; ++i) taken.push_back(pool.take(256));
  for (Buffer& buffer : taken) pool.give(std::move(buffer));
  EXPECT_EQ(pool.kept_bytes(), 1024U);
  pool.give(pool.take(2048));
  EXPECT_EQ(pool.kept_bytes(), 1024U);
  {
    const Buffer one = pool.take(1);
    EXPECT_EQ(pool.kept_bytes(), 768U);
    pool.give(Buffer(512));
    EXPECT_EQ(pool.kept_bytes(), 768U);
    pool.give(Buffer(256));
    EXPECT_EQ(pool.kept_bytes(), 1024U);
  }
}

TEST(WireBufferPool, ABoundOf0KeepsNothing) {
  BufferPool pool(0);
  pool.give(pool.take(1));
  EXPECT_EQ(pool.kept_bytes(), 0U);
}

TEST(WireBufferPool, FreesBuffersOfOddCapacityAndEmptyOnes) {
  BufferPool pool;
  pool.give(Buffer());
  pool.give(Buffer(300));
  pool.give(Buffer(128));
  EXPECT_EQ(pool.kept_bytes(), 0U);
}

TEST(WireBufferPool, AnImpossibleCapacityThrowsAndChangesNothing) {
  BufferPool pool;
  pool.give(pool.take(256));
  EXPECT_THROW((void)pool.take(static_cast<std::size_t>(-1)), std::bad_alloc);
  EXPECT_EQ(pool.kept_bytes(), 256U);
}

}  // namespace
}  // namespace msgtrans::wire
