// The least reach that matters (head.py), computed by one threadgroup of (THREADS, 1, 1).
//
// top, reach (tiles,) float; choice (2,) float: temperature, tail -> least (1,) float.
//
// Greedy: it is the best estimate. If a token is sampled, it is the largest number below which all tokens together
// weigh at most `tail` relative to the best, each counted with its tile's reach. The search starts 64 temperatures
// below the best (e^-64 of it is negligible). It takes one of WAYS - 1 equally spaced numbers, then one of as many
// between that and the next, and so on: ROUNDS passes over data that a Mac's cache holds. It ends at most temperature /
// 8 below the best.
constexpr uint SIMD_GROUPS = THREADS / 32;
constexpr int WAYS = 8, ROUNDS = 3, R = 4;
const uint tiles = top_shape[0], lane = thread_index_in_simdgroup, index = thread_index_in_threadgroup;
const float temperature = choice[0], tail = choice[1];
threadgroup float parts[SIMD_GROUPS];

float best = LEAST;
for (uint t = index; t < tiles; t += THREADS) best = top[t] > best ? top[t] : best;
best = simd_max(best);
if (lane == 0) parts[simdgroup_index_in_threadgroup] = best;
threadgroup_barrier(mem_flags::mem_threadgroup);
best = simd_max(lane < SIMD_GROUPS ? parts[lane] : LEAST);
best -= HALF_UNIT * metal::abs(best);
float below = best;
if (temperature > 0) {  // the same for all threads
  float width = 64 * temperature;
  below -= width;
  for (int turn = 0; turn < ROUNDS; turn++) {
    width /= WAYS;
    float mass[WAYS - 1] = {0};
    for (uint t = index; t < tiles; t += THREADS) {
      const float far = reach[t], weight = R * metal::exp((far - best) / temperature);
      UNROLLED for (int i = 0; i < WAYS - 1; i++) mass[i] += far < below + (i + 1) * width ? weight : 0.0f;
    }
    int steps = 0;
    UNROLLED for (int i = 0; i < WAYS - 1; i++) {
      const float sum = simd_sum(mass[i]);
      threadgroup_barrier(mem_flags::mem_threadgroup);  // all threads have read the previous values
      if (lane == 0) parts[simdgroup_index_in_threadgroup] = sum;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      steps += simd_sum(lane < SIMD_GROUPS ? parts[lane] : 0.0f) <= tail ? 1 : 0;
    }
    below += steps * width;
  }
}
if (index == 0) least[0] = below;
