// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <gtest/gtest.h>
#include <msgtrans/protocol/latency_histogram.hpp>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace msgtrans {
namespace {

using std::chrono::nanoseconds;
using namespace std::chrono_literals;

/// Spread over all powers of two from nanoseconds to an hour.
std::vector<nanoseconds> samples(std::size_t count, unsigned seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> exponent(0, std::log2(3.6e12));
  std::vector<nanoseconds> all(count);
  for (auto& one : all) one = nanoseconds(static_cast<std::int64_t>(std::exp2(exponent(random))));
  return all;
}

LatencyHistogram of(const std::vector<nanoseconds>& all) {
  LatencyHistogram histogram;
  for (const auto one : all) histogram.record(one);
  return histogram;
}

TEST(LatencyHistogram, IsEmptyAtFirst) {
  const LatencyHistogram histogram;
  EXPECT_TRUE(histogram.empty());
  EXPECT_EQ(histogram.count(), 0U);
  for (const auto value : {histogram.min(), histogram.max(), histogram.mean(), histogram.total(), histogram.quantile(0),
                           histogram.quantile(0.5), histogram.quantile(1)}) {
    EXPECT_EQ(value, 0ns);
  }
  histogram.for_each_bucket([](nanoseconds, nanoseconds, std::uint64_t) { FAIL(); });
}

TEST(LatencyHistogram, QuantilesAreWithinTheErrorItPromises) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    auto sorted = samples(seed * 317, seed);
    const auto histogram = of(sorted);
    std::ranges::sort(sorted);
    for (double q = 0; q <= 1; q += 1.0 / 512) {
      const auto rank =
          std::max<std::size_t>(1, static_cast<std::size_t>(std::ceil(q * static_cast<double>(sorted.size()))));
      const auto exact = static_cast<double>(sorted[rank - 1].count());
      const auto told = static_cast<double>(histogram.quantile(q).count());
      EXPECT_LE(std::abs(told - exact), exact < 1024 ? 32 : exact / 32) << "seed " << seed << ", q " << q;
    }
  }
}

TEST(LatencyHistogram, CountSumLeastAndMostAreExact) {
  const auto all = samples(5000, 3);
  const auto histogram = of(all);
  EXPECT_EQ(histogram.count(), all.size());
  const auto sum = std::accumulate(all.begin(), all.end(), 0ns);
  EXPECT_EQ(histogram.total(), sum);
  EXPECT_EQ(histogram.mean(), sum / 5000);
  EXPECT_EQ(histogram.min(), *std::ranges::min_element(all));
  EXPECT_EQ(histogram.max(), *std::ranges::max_element(all));
  EXPECT_EQ(histogram.quantile(0), histogram.min());
  EXPECT_EQ(histogram.quantile(1), histogram.max());
  EXPECT_EQ(histogram.quantile(-1), histogram.min());
  EXPECT_EQ(histogram.quantile(2), histogram.max());
  EXPECT_EQ(histogram.quantile(std::nan("")), histogram.min());
}

TEST(LatencyHistogram, TakesAnyDuration) {
  LatencyHistogram histogram;
  for (const nanoseconds one : {nanoseconds::min(), -1ns, 0ns, 63ns, 64ns, 1023ns, 1024ns}) histogram.record(one);
  for (const nanoseconds one : {nanoseconds(1h), nanoseconds(1000h), nanoseconds::max() / 2}) histogram.record(one);
  EXPECT_EQ(histogram.count(), 10U);
  EXPECT_EQ(histogram.min(), 0ns);
  EXPECT_EQ(histogram.max(), nanoseconds::max() / 2);
  EXPECT_NEAR(static_cast<double>(histogram.quantile(0.8).count()), 3.6e12, 3.6e12 / 32) << "1 h is still in range";
}

TEST(LatencyHistogram, BucketsFollowOneAnotherAndHoldWhatWasRecorded) {
  const auto all = samples(3000, 9);
  const auto histogram = of(all);
  nanoseconds last = -1ns;
  std::uint64_t count = 0;
  histogram.for_each_bucket([&](nanoseconds from, nanoseconds below, std::uint64_t here) {
    EXPECT_LT(last, from);
    EXPECT_LT(from, below);
    const auto inside = std::ranges::count_if(all, [&](auto one) { return one >= from && one < below; });
    EXPECT_EQ(static_cast<std::uint64_t>(inside), here) << from.count();
    if (from >= 1024ns && from < 3600s) {
      EXPECT_LE((below - from).count() * 16, from.count());
    }
    last = from;
    count += here;
  });
  EXPECT_EQ(count, all.size());
}

TEST(LatencyHistogram, MergedIsAsIfAllHadBeenRecordedInOne) {
  const auto one = samples(700, 1), other = samples(900, 2);
  auto both = one;
  both.insert(both.end(), other.begin(), other.end());
  EXPECT_EQ(of(one) + of(other), of(both));
  auto sum = of(one);
  sum += LatencyHistogram{};
  EXPECT_EQ(sum, of(one));
  LatencyHistogram from_nothing;
  from_nothing += of(other);
  EXPECT_EQ(from_nothing, of(other));
}

TEST(LatencyHistogram, SinceAnEarlierSnapshotHasOnlyWhatCameLater) {
  auto histogram = of(samples(1000, 4));
  const auto before = histogram;
  EXPECT_TRUE(histogram.since(before).empty());
  EXPECT_EQ(histogram.since(before), LatencyHistogram{});
  for (int i = 0; i < 100; ++i) histogram.record(5ms);
  const auto later = histogram.since(before);
  EXPECT_EQ(later.count(), 100U);
  EXPECT_EQ(later.total(), 500ms);
  for (const auto value : {later.min(), later.max(), later.quantile(0.5), later.quantile(0.99)}) {
    EXPECT_NEAR(static_cast<double>(value.count()), 5e6, 5e6 / 16);
  }
}

TEST(LatencyRecorder, GivesTheHistogramOfWhatWasRecorded) {
  const auto all = samples(2000, 5);
  protocol::LatencyRecorder recorder;
  LatencyHistogram empty;
  recorder.add_to(empty);
  EXPECT_EQ(empty, LatencyHistogram{});
  for (const auto one : all) recorder.record(one);
  LatencyHistogram snapshot;
  recorder.add_to(snapshot);
  EXPECT_EQ(snapshot, of(all));
  recorder.add_to(snapshot);
  EXPECT_EQ(snapshot, of(all) + of(all));
}

TEST(LatencyRecorder, IsReadWhileAnotherThreadRecords) {
  protocol::LatencyRecorder recorder;
  constexpr std::uint64_t count = 200'000;
  std::thread writer([&recorder] {
    for (std::uint64_t i = 0; i < count; ++i) recorder.record(nanoseconds(1000 + i));
  });
  std::uint64_t last = 0;
  while (last < count) {
    LatencyHistogram snapshot;
    recorder.add_to(snapshot);
    ASSERT_GE(snapshot.count(), last);
    last = snapshot.count();
    if (last != 0) {
      EXPECT_GE(snapshot.quantile(0.5), 900ns);
    }
  }
  writer.join();
}

}  // namespace
}  // namespace msgtrans
