{{- define "trident.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "trident.labels" -}}
app.kubernetes.io/name: trident
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "trident.selector" -}}
app.kubernetes.io/name: trident
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* An image's reference: the chart's image with another one's keys over it. Arguments: root, image. */}}
{{- define "trident.image" -}}
{{- $image := merge (dict) (.image | default dict) .root.Values.image -}}
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{- define "trident.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "trident.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Parts of the servers' pod. Arguments of each: root, pool, models, component, image. */}}
{{- define "trident.serverSettings" -}}
{{- $values := .root.Values -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add $values.server.preStopSeconds $values.server.graceSeconds 15 }}
securityContext:
  {{- include "trident.podSecurity" .root | nindent 2 }}
{{- with $values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.server.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pool.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pool.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "trident.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- if eq .models.source "export" }}
initContainers:
  - name: export
    image: {{ required "models.export.image names an image with the exporter's packages" .models.export.image }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    command: [python, -m, trident_export, export, --models-file, /etc/trident/models.toml, --repository, /models, --cache, /cache]
    env:
      - {name: HOME, value: /tmp}
    securityContext:
      {{- include "trident.containerSecurity" .root | nindent 6 }}
    resources:
      {{- toYaml .models.export.resources | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models, subPath: repository}
      - {name: models, mountPath: /cache, subPath: cache}
      - {name: models-file, mountPath: /etc/trident, readOnly: true}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end -}}

{{- define "trident.serverContainers" -}}
{{- $values := .root.Values -}}
{{- $models := .models -}}
containers:
  - name: {{ if eq $values.mode "kserve" }}kserve-container{{ else }}trident{{ end }}
    image: {{ include "trident.image" (dict "root" .root "image" .image) }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args:
      - --grace={{ $values.server.graceSeconds }}
      {{- range $values.server.extraArgs }}
      - {{ . | quote }}
      {{- end }}
    {{- if or $values.server.adminKeySecret $values.server.env }}
    env:
      {{- with $values.server.adminKeySecret }}
      - name: TRIDENT_ADMIN_KEY
        valueFrom:
          secretKeyRef: {name: {{ . }}, key: admin-key}
      {{- end }}
      {{- with $values.server.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
    ports:
      {{- if eq $values.mode "kserve" }}
      - {name: http1, containerPort: 8000, protocol: TCP}
      {{- else }}
      - {name: http, containerPort: 8000, protocol: TCP}
      - {name: grpc, containerPort: 8001, protocol: TCP}
      - {name: metrics, containerPort: 8002, protocol: TCP}
      {{- end }}
    securityContext:
      {{- include "trident.containerSecurity" .root | nindent 6 }}
    resources:
      {{- toYaml .pool.resources | nindent 6 }}
    # A start takes as long as the models take to load; only then do the others begin to ask.
    startupProbe:
      httpGet: {path: /v2/health/ready, port: 8000}
      periodSeconds: 5
      timeoutSeconds: 4
      failureThreshold: {{ div (add $values.server.startSeconds 4) 5 }}
    # The server takes no request while a model is loaded or unloaded, and while it drains.
    readinessProbe:
      httpGet: {path: /v2/health/ready, port: 8000}
      periodSeconds: 5
      timeoutSeconds: 4
      failureThreshold: 2
    # The launcher ends by itself when tritonserver dies or hangs; this is for a launcher that hangs, too. Not the port of
    # requests: one that callers keep busy would end all answers.
    livenessProbe:
      httpGet: {path: /metrics, port: 8002}
      periodSeconds: 10
      timeoutSeconds: 10
      failureThreshold: 6
    lifecycle:
      preStop:
        exec:
          command: [sleep, {{ $values.server.preStopSeconds | quote }}]
    volumeMounts:
      {{- if ne $models.source "image" }}
      - name: models
        mountPath: /models
        readOnly: true
        {{- if eq $models.source "export" }}
        subPath: repository
        {{- else if and (eq $models.source "pvc") $models.pvc.subPath }}
        subPath: {{ $models.pvc.subPath }}
        {{- end }}
      {{- end }}
      - {name: shared-memory, mountPath: /dev/shm}
      - {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "trident.serverVolumes" -}}
{{- $values := .root.Values -}}
{{- $models := .models -}}
volumes:
  {{- if eq $models.source "pvc" }}
  - name: models
    persistentVolumeClaim:
      claimName: {{ $models.pvc.claimName }}
      readOnly: true
  {{- else if eq $models.source "oci" }}
  - name: models
    image:
      reference: {{ required "models.oci.reference names an OCI image" $models.oci.reference }}
      pullPolicy: {{ $models.oci.pullPolicy }}
  {{- else if eq $models.source "export" }}
  - name: models
    emptyDir:
      sizeLimit: {{ $models.export.size }}
  - name: models-file
    configMap:
      name: {{ include "trident.name" .root }}-models-{{ .component }}
  {{- end }}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ $values.server.sharedMemory }}
  - name: tmp
    emptyDir:
      sizeLimit: {{ $values.server.temporary }}
{{- end -}}

{{/* The models of the canary: the chart's with the canary's keys over them, as YAML. */}}
{{- define "trident.canaryModels" -}}
{{- mergeOverwrite (deepCopy .Values.models) .Values.canary.models | toYaml -}}
{{- end -}}
