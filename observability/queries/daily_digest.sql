-- What happened on each of the last seven days (UTC), by severity and type, worst first?
SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    severity,
    error_type,
    SUM(occurrences)::bigint AS occurrences,
    COUNT(DISTINCT thread_id) AS threads,
    COALESCE(SUM(occurrences) FILTER (WHERE resolved_at IS NULL), 0)::bigint AS unresolved,
    COALESCE(SUM(occurrences) FILTER (WHERE outcome = 'lost'), 0)::bigint AS lost
FROM system_errors
WHERE created_at >= (date_trunc('day', now() AT TIME ZONE 'UTC') - '6 days'/*:back*/::interval) AT TIME ZONE 'UTC'
GROUP BY day, severity, error_type
ORDER BY
    day DESC,
    CASE severity WHEN 'critical' THEN 4 WHEN 'error' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END DESC,
    occurrences DESC,
    error_type;
