// A group of threads on a CPU, for tests: a loop runs the threads one after another between two barriers.
//
// `Traced` groups also check what a GPU would punish or leave undefined, and count what it would cost. Between two
// barriers no thread may access bytes of shared memory that another one writes, nor any thread those of a pending copy;
// nothing unwritten may be read; accesses are aligned and inside their tensors; each byte of an output is written once.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "mx_tile.cuh"

namespace aotrain::mx {

constexpr int kWarp = 32;

// What a cast may read or write in global memory.
struct Range {
    const uint8_t* first;
    int64_t bytes;
    std::vector<uint8_t> written;  // how often; empty for an input

    bool holds(const uint8_t* p, int64_t n) const { return first <= p && p + n <= first + bytes; }
};

// Of all accesses of one kind: by how many instructions of a warp, how many bytes, in how many transactions (passes of
// shared memory, 32-byte sectors of global memory), and how many it takes at least.
struct Traffic {
    int64_t instructions, bytes, transactions, least;
};

struct Report {
    int64_t races, uninitialized, outside, misaligned, rewritten, unwritten;
    Traffic traffic[kAccesses];
};

class Trace {
   public:
    Trace(const Arguments& a, const Cast& c, int64_t shared_bytes, Report& to) : report(to), bytes(shared_bytes) {
        const int64_t item = a.input == kFloat32Input ? 4 : 2;
        const int64_t last = (a.batch - 1) * a.batch_stride + (a.rows - 1) * a.row_stride + a.columns;
        ranges.push_back({static_cast<const uint8_t*>(a.x), last * item, {}});
        ranges.push_back({reinterpret_cast<const uint8_t*>(a.group_ends), a.groups * 4, {}});
        for (const Output& out : {c.by_row, c.by_column}) {
            if (out.codes == nullptr) continue;
            ranges.push_back({out.codes, a.batch * out.codes_matrix, {}});
            ranges.push_back({out.scale, a.batch * out.scale_matrix, {}});
        }
        for (size_t i = 2; i < ranges.size(); i++) ranges[i].written.resize(ranges[i].bytes);
    }

    void start_tile() {
        std::fill(bytes.begin(), bytes.end(), Byte{});
        instructions.clear();
    }
    void start_phase() {
        phase++;
        for (auto& count : counts) std::fill(std::begin(count), std::end(count), 0);
    }
    void start_interval() {
        for (Byte& byte : bytes) byte = {kNobody, kNobody, byte.set};
    }

    void shared_access(Access access, int thread, int64_t offset, int size, bool write, bool pending = false) {
        report.misaligned += offset % size != 0;
        report.outside += offset < 0 || offset + size > static_cast<int64_t>(bytes.size());
        for (int64_t i = offset; i < offset + size; i++) {
            Byte& byte = bytes[i];
            const auto other = [&](int who) { return who != kNobody && who != thread; };
            report.races += other(byte.writer) || (write && other(byte.reader));
            report.uninitialized += !write && !byte.set;
            if (write)
                byte.writer = pending ? kPending : thread;
            else
                byte.reader = other(byte.reader) ? kSeveral : thread;
            byte.set |= write;
        }
        log(access, thread, offset, size);
    }

    void global_access(Access access, int thread, const uint8_t* p, int size, bool write) {
        const auto found = std::find_if(ranges.begin(), ranges.end(), [&](const Range& r) { return r.holds(p, size); });
        if (found == ranges.end() || found->written.empty() == write) {
            report.outside++;
            return;
        }
        if (write)
            for (int i = 0; i < size; i++) report.rewritten += found->written[p - found->first + i]++ != 0;
        log(access, thread, reinterpret_cast<int64_t>(p), size);
    }
    void aligned(const void* p, int size) { report.misaligned += reinterpret_cast<uintptr_t>(p) % size != 0; }

    void finish_tile() {
        for (const auto& [key, lanes] : instructions) {
            const Access access = std::get<1>(key);
            Traffic& t = report.traffic[access];
            int64_t moved = 0;
            for (const auto& lane : lanes) moved += lane.size;
            const bool global = access <= kReadGroupEnds || access >= kWriteRowCodes;
            t.instructions++;
            t.bytes += moved;
            t.transactions += global ? sectors(lanes) : passes(lanes);
            t.least += (moved + (global ? 31 : 127)) / (global ? 32 : 128);
        }
    }
    void finish() {
        for (const Range& range : ranges)
            report.unwritten += std::count(range.written.begin(), range.written.end(), uint8_t{0});
    }

   private:
    static constexpr int kNobody = -1, kSeveral = -2, kPending = -3;
    struct Byte {
        int writer = kNobody, reader = kNobody;
        bool set = false;
    };
    struct Lane {
        int lane;
        int64_t address;
        int size;
    };

    void log(Access access, int thread, int64_t address, int size) {
        const int count = counts[thread][access]++;
        instructions[{phase, access, count, thread / kWarp}].push_back({thread % kWarp, address, size});
    }

    // A warp's access is done for as many lanes at a time as 128 bytes serve; of these, words of one bank come in turn.
    static int64_t passes(const std::vector<Lane>& lanes) {
        int64_t sum = 0;
        const int together = smaller(kWarp, 128 / lanes[0].size);
        for (int first = 0; first < kWarp; first += together) {
            std::set<int64_t> words[32];
            for (const Lane& lane : lanes)
                if (lane.lane >= first && lane.lane < first + together)
                    for (int64_t word = lane.address / 4; word * 4 < lane.address + lane.size; word++)
                        words[word % 32].insert(word);
            size_t most = 0;
            for (const auto& bank : words) most = larger(most, bank.size());
            sum += static_cast<int64_t>(most);
        }
        return sum;
    }
    static int64_t sectors(const std::vector<Lane>& lanes) {
        std::set<int64_t> found;
        for (const Lane& lane : lanes)
            for (int64_t s = lane.address / 32; s * 32 < lane.address + lane.size; s++) found.insert(s);
        return static_cast<int64_t>(found.size());
    }

    Report& report;
    std::vector<Byte> bytes;
    std::vector<Range> ranges;
    int phase = 0;
    int counts[kThreads][kAccesses] = {};
    std::map<std::tuple<int, Access, int, int>, std::vector<Lane>> instructions;
};

template <bool kTraced>
struct HostGroup {
    template <class T>
    struct Local {
        T value[kThreads];
        T& operator[](int thread) { return value[thread]; }
    };

    uint8_t* shared;
    int64_t shared_bytes;
    uint32_t tile;
    bool reversed;  // the order in which threads run
    bool barriers;  // false: as if there were none, to see that it is noticed
    Trace* trace;
    int thread = 0;

    template <class F>
    void threads(const F& f) {
        if constexpr (kTraced) trace->start_phase();
        for (int i = 0; i < kThreads; i++) {
            thread = reversed ? kThreads - 1 - i : i;
            f(thread);
        }
    }
    void barrier() {
        if constexpr (kTraced)
            if (barriers) trace->start_interval();
    }
    void keep_larger_of_pairs(Local<uint32_t>& local) {
        for (int i = 0; i < kThreads; i += 2) local[i] = local[i + 1] = larger(local[i], local[i + 1]);
    }
    void copy(Access access, uint8_t* to, const uint8_t* from, int bytes) {
        std::memset(to, 0, kVector);
        std::memcpy(to, from, bytes);
        if constexpr (kTraced) {
            trace->aligned(from, kVector);
            if (bytes > 0) trace->global_access(access, thread, from, bytes, false);
            trace->shared_access(kTileWrite, thread, to - shared, kVector, true, true);
        }
    }
    template <class T>
    T load(Access access, const uint8_t* from) {
        T value;
        std::memcpy(&value, from, sizeof(T));
        if constexpr (kTraced) check(access, from, sizeof(T), false);
        return value;
    }
    template <class T>
    void store(Access access, uint8_t* to, const T& value) {
        if constexpr (kTraced) check(access, to, sizeof(T), true);
        std::memcpy(to, &value, sizeof(T));
    }

   private:
    void check(Access access, const uint8_t* p, int size, bool write) {
        if (shared <= p && p < shared + shared_bytes) {
            trace->shared_access(access, thread, p - shared, size, write);
        } else {
            trace->aligned(p, size);
            trace->global_access(access, thread, p, size, write);
        }
    }
};

}  // namespace aotrain::mx
