// The kernel of mx_cast.cu and the functions it is made of, compiled for a CPU: for tests, which compare them with
// aotrain.formats bit for bit. Compile with -ffp-contract=off.
#include "group_host.h"

namespace aotrain::mx {
namespace {

struct Order {
    bool reversed, barriers;
};

template <class In, class E, int kWays, bool kTraced>
void run(const Arguments& a, const Cast& c, Order order, Report* report) {
    // A NaN, of float32 and of both 16-bit formats: nothing may depend on what is not written.
    std::vector<Words<4>> shared(kSharedBytes<In> / kVector, {0x7FFF7FFF, 0x7FFF7FFF, 0x7FFF7FFF, 0x7FFF7FFF});
    auto* const bytes = reinterpret_cast<uint8_t*>(shared.data());
    HostGroup<kTraced> group{bytes, kSharedBytes<In>, 0, order.reversed, order.barriers, nullptr};
    if constexpr (kTraced) {
        *report = {};
        Trace trace(a, c, kSharedBytes<In>, *report);
        group.trace = &trace;
        for (group.tile = 0; group.tile < c.tiles; group.tile++) {
            trace.start_tile();
            cast_tile<In, E, kWays>(c, group);
            trace.finish_tile();
        }
        trace.finish();
    } else {
        for (group.tile = 0; group.tile < c.tiles; group.tile++) cast_tile<In, E, kWays>(c, group);
    }
}

template <class In, class E, bool kTraced>
void run_ways(const Arguments& a, const Cast& c, Order order, Report* report) {
    if (a.codes_t == nullptr)
        run<In, E, kRows, kTraced>(a, c, order, report);
    else if (a.codes == nullptr)
        run<In, E, kColumns, kTraced>(a, c, order, report);
    else
        run<In, E, kBothWays, kTraced>(a, c, order, report);
}

template <class In, bool kTraced>
void run_element(const Arguments& a, const Cast& c, Order order, Report* report) {
    if (a.element == kE4m3) return run_ways<In, E4m3, kTraced>(a, c, order, report);
    if (a.element == kE5m2) return run_ways<In, E5m2, kTraced>(a, c, order, report);
    run_ways<In, E2m1, kTraced>(a, c, order, report);
}

template <bool kTraced>
int cast(const Arguments& a, Order order, Report* report) {
    Cast c;
    if (!plan(a, c)) return 1;
    if (a.input == kFloat32Input)
        run_element<Float32, kTraced>(a, c, order, report);
    else if (a.input == kBfloat16Input)
        run_element<Bfloat16, kTraced>(a, c, order, report);
    else
        run_element<Float16, kTraced>(a, c, order, report);
    return 0;
}

template <class F>
void with_element(int element, const F& f) {
    if (element == kE4m3) return f(E4m3{});
    if (element == kE5m2) return f(E5m2{});
    f(E2m1{});
}

}  // namespace
}  // namespace aotrain::mx

using namespace aotrain::mx;

extern "C" {

// As in mx_cast.cu.
int aotrain_mx_cast(const void* arguments, void*) {
    return cast<false>(*static_cast<const Arguments*>(arguments), {false, true}, nullptr);
}

const char* aotrain_mx_cast_error(int error) { return error ? "more tiles than a launch can have" : "no error"; }

int aotrain_mx_cast_traced(const void* arguments, int reversed, int barriers, Report* report) {
    return cast<true>(*static_cast<const Arguments*>(arguments), {reversed != 0, barriers != 0}, report);
}

int aotrain_mx_accesses() { return kAccesses; }

void aotrain_mx_scale_bytes(const uint32_t* amax, int64_t n, int element, int rounding, uint8_t* bytes) {
    const ScaleRule rule = scale_rule_of(element, rounding);
    for (int64_t i = 0; i < n; i++) bytes[i] = static_cast<uint8_t>(scale_byte(amax[i], rule));
}

void aotrain_mx_inverses(const uint8_t* bytes, int64_t n, float* inverses) {
    for (int64_t i = 0; i < n; i++) inverses[i] = inverse_of(bytes[i]);
}

void aotrain_mx_codes(const float* y, int64_t n, int element, uint8_t* codes) {
    with_element(element, [&](auto e) {
        for (int64_t i = 0; i < n; i++) codes[i] = static_cast<uint8_t>(code_of<decltype(e)>(y[i]));
    });
}

void aotrain_mx_halves(const uint16_t* halves, int64_t n, float* values) {
    for (int64_t i = 0; i < n; i++) values[i] = Float16::value(halves[i], 0);
}
}
