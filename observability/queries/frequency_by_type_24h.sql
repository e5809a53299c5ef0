-- How often did each type of error happen in the last 24 hours, and how bad was it at worst?
SELECT
    error_type,
    SUM(occurrences)::bigint AS occurrences,
    COUNT(DISTINCT thread_id) AS threads,
    (ARRAY['info', 'warning', 'error', 'critical'])[
        MAX(CASE severity WHEN 'critical' THEN 4 WHEN 'error' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END)
    ] AS worst_severity,
    COALESCE(SUM(occurrences) FILTER (WHERE resolved_at IS NULL), 0)::bigint AS unresolved,
    MIN(created_at) AS first_seen,
    MAX(COALESCE(last_seen_at, created_at)) AS last_seen
FROM system_errors
WHERE created_at >= now() - '24 hours'/*:window*/::interval
GROUP BY error_type
ORDER BY occurrences DESC, error_type;
