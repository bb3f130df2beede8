-- What wrk asks, and one line of JSON with what it measured: see load.py.
-- Arguments: path of the body, then a line "Name: value" for each header.

function init(args)
    local source = assert(io.open(args[1], "rb"))
    wrk.method = "POST"
    wrk.body = source:read("*a")
    source:close()
    for position = 2, #args do
        local name, value = args[position]:match("^([^:]+): (.*)$")
        wrk.headers[name] = value
    end
end

function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '\n{"requests": %d, "duration_us": %d, "not_ok": %d, "connect": %d, "read": %d, "write": %d, "timeout": %d, '
            .. '"mean_us": %.1f, "p50_us": %.1f, "p90_us": %.1f, "p99_us": %.1f, "max_us": %.1f}\n',
        summary.requests, summary.duration, errors.status, errors.connect, errors.read, errors.write, errors.timeout,
        latency.mean, latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max
    ))
end
