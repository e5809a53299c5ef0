-- Which types of critical error arrived in the last five minutes? Any row is a reason to wake someone.
-- By arrival, since what an outage held back would never show up by its own time.
SELECT
    error_type,
    SUM(occurrences)::bigint AS occurrences,
    COUNT(DISTINCT thread_id) AS threads,
    MIN(created_at) AS first_seen,
    MAX(created_at) AS last_seen,
    (ARRAY_AGG(error_message ORDER BY created_at DESC, id DESC))[1] AS last_message
FROM system_errors
WHERE severity = 'critical' AND resolved_at IS NULL AND recorded_at >= now() - interval '5 minutes'
GROUP BY error_type
ORDER BY occurrences DESC, error_type;
